# SPDX-License-Identifier: Apache-2.0
"""Self-verification (S2D2, arXiv 2603.25702): the tokens of autoregressive decoding within each block, in fewer forwards.

A block-causal model with blocks of one token would be autoregressive, so the same weights can verify what they drafted. A
pass in both directions drafts all tokens of a sub-block. A pass over the block from left to right says what the model takes
after each of them. The drafts stay up to the first that it does not take. There its own token stands, and the next pass
drafts what is left. So the answer does not depend on the drafts. It is that of `small_block_size=1`, where nothing can be
drafted. Finished blocks are read in both directions, as the model was trained, and a block's first token comes from there.

The paper also lets a threshold decide where a verification seems not to pay, and takes a draft by chance, as likely as the
two passes agree; its answers depend on the drafts. Here every draft is verified, and taken only if it is the verifier's own.
"""

from dataclasses import dataclass

from fastdllm.decoders import self_speculate


@dataclass(frozen=True)
class Decoder(self_speculate.Decoder):
    """Fast-dLLM v2: the tokens of reading a block from left to right with the same weights, for models that do it well."""

    in_blocks = True
