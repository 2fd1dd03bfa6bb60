# SPDX-License-Identifier: Apache-2.0
"""Rollouts for training by reward: drawn answers to a question, their rewards, log-probabilities and order of commits.

    python examples/rl_rollout.py

A policy gradient needs the log-probability of every token at the moment it was committed, and which tokens were committed
together. `generate` returns both: `logprobs` are untempered, `committed_at` counts the answer's forwards from 1.
"""

import torch

import fastdllm

ROLLOUTS = 8

model = fastdllm.load("tiny-llada")
question = (
    "Elizabeth scored 300 points in one game of archery. Karen scored 28 more than 50% as many as Elizabeth. "
    "How many points did Elizabeth and Karen have in total?"
)
conversation = [{"role": "user", "content": question}]

# Row i draws from seed + i, so the answers differ, and a run can be repeated. The temperature is high for variety: the
# shipped model is very sure of these problems.
out = fastdllm.generate(model, [conversation] * ROLLOUTS, gen_length=128, temperature=2.0, threshold=0.9, seed=1)
# A right answer is worth more the fewer forwards it took: such a reward teaches a model to decode in parallel.
rewards = torch.tensor(
    [text.endswith("#### 478") / forwards for text, forwards in zip(out.texts, out.stats.row_forwards, strict=True)]
)
advantages = (rewards - rewards.mean()) / rewards.std().clamp(min=1e-6)

print("reward  advantage  log-probability  forwards  last line")
for text, reward, advantage, logprobs, order in zip(
    out.texts, rewards, advantages, out.logprobs, out.committed_at, strict=True
):
    figures = f"{reward:6.2f}  {advantage:9.2f}  {logprobs.sum():15.3f}  {order.max():8d}"
    print(f"{figures}  {text.splitlines()[-1] if text else ''!r}")

# One trajectory, forward by forward: the tokens of a forward are drawn independently, given those of the forwards before.
answer = out.sequences[0][-len(out.committed_at[0]) :]
for forward in range(1, int(out.committed_at[0].max()) + 1):
    together = out.committed_at[0] == forward
    tokens = [model.tokenizer.decode(token) for token in answer[together]]
    print(f"forward {forward}: log-probability {out.logprobs[0][together].sum():8.3f} of {tokens}")
