# SPDX-License-Identifier: Apache-2.0
"""Ask a shipped model, look at what it cost, and follow the answer forward by forward: python examples/quick_start.py"""

import fastdllm

model = fastdllm.load("tiny-llada")
question = "A student has 23 pencils. His sister has 7 fewer pencils than he has. How many pencils do they have together?"
conversation = [{"role": "user", "content": question}]

out = fastdllm.generate(model, conversation, preset="balanced")
print(out.texts[0])
print(f"{out.stats.tokens} tokens in {out.stats.forwards} forwards\n")

for trace in fastdllm.watch(model, conversation, gen_length=64):
    text = "".join("░" if token == trace.mask_id else model.tokenizer.decode(token) for token in trace.answer())
    print(f"{len(trace.steps)} {text!r}")
