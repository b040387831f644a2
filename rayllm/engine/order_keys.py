"""The best tokens of a vocabulary in one definite order: by logit, and the lower id first where logits are equal.

Half-precision models produce equal logits all the time, and `torch.topk` and `torch.sort` promise nothing about
their order. Here logit and id are packed into one integer, unique in its row, so that any selection gives the one
answer that does not depend on the batch or the device.
"""

import torch
from torch import Tensor

_LOW_32 = 0xFFFFFFFF
_BLOCK = 32


def order_keys(logits_BK: Tensor, token_ids_BK: Tensor) -> Tensor:
    """float32 logits and the ids they belong to (both [B, K], or broadcast) -> int64 keys; larger comes earlier."""
    bits = (logits_BK + 0.0).view(torch.int32)  # + 0.0 turns -0.0 into 0.0, which compares equal to it
    # IEEE 754 floats order like sign-magnitude integers; this makes them two's complement.
    bits ^= (bits >> 31) & 0x7FFFFFFF
    keys = bits.to(torch.int64)
    keys <<= 32
    keys |= _LOW_32 - token_ids_BK
    return keys


def token_ids(keys: Tensor) -> Tensor:
    """The token id that each key was made for."""
    return _LOW_32 - (keys & _LOW_32)


def best_keys(logits_BV: Tensor, size: int) -> Tensor:
    """The keys of each row's `size` best tokens, best first: [B, size] from float32 [B, V].

    For a small `size` only blocks of the vocabulary that can matter are looked at closely. If a token is among the best
    `size`, then so is its block among the blocks by their best token: each block before it holds a token before it.
    """
    vocab_size = logits_BV.shape[-1]
    all_ids_V = torch.arange(vocab_size, device=logits_BV.device)
    num_blocks = vocab_size // _BLOCK
    if num_blocks < 4 * size:
        return order_keys(logits_BV, all_ids_V).topk(size, dim=-1).values
    whole = num_blocks * _BLOCK
    blocks = logits_BV[:, :whole].view(-1, num_blocks, _BLOCK)
    chosen = best_keys(blocks.amax(dim=-1), size)
    index = token_ids(chosen).unsqueeze(-1).expand(-1, -1, _BLOCK)
    ids = (index * _BLOCK + all_ids_V[:_BLOCK]).flatten(1)
    candidates = torch.cat((blocks.gather(1, index).flatten(1), logits_BV[:, whole:]), dim=1)
    ids = torch.cat((ids, all_ids_V[whole:].expand(len(ids), -1)), dim=1)
    return order_keys(candidates, ids).topk(size, dim=-1).values
