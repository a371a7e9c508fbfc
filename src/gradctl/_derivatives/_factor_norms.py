"""Sums of outer products: their norms without summing them, and the sums themselves."""

from __future__ import annotations

import torch
from torch import Tensor

from gradctl._derivatives._weight_uses import Factors

# A block of weight gradients that is formed at once: at most this share of the samples, and about this many elements.
_SHARE = 4
_ELEMENTS = 1 << 20


def squared_norms(parts: list[Factors]) -> Tensor:
    """The squared norm of each sample's sum of outer products over all parts, [B].

    Args:
        parts: uses of one weight, by sample: left [B, T, O] or integers [B, T], right [B, T, I].
    """
    parts = [_wide(part) for part in parts]
    dense = [part for part in parts if part.left.is_floating_point()]
    listed = [part for part in parts if not part.left.is_floating_point()]
    joined = [_join(dense)] if dense else []
    if listed:
        joined.append(_join(listed))
    total = torch.stack([_own(part) for part in joined]).sum(0) if len(joined) > 1 else _own(joined[0])
    if len(joined) == 2:
        total = total + 2 * _cross(joined[0], joined[1])
    return total


def products(parts: list[Factors], direction: Tensor) -> Tensor:
    """The inner product of each sample's gradient with `direction` [O, I], [B]."""
    total: list[Tensor] = []
    for part in map(_wide, parts):
        if not part.left.is_floating_point():
            total.append((direction[part.left] * part.right).sum((1, 2)))
            continue
        left, right = _blocks(part.left, part.groups), _blocks(part.right, part.groups)
        sheets = direction.reshape(part.groups, left.shape[-1], right.shape[-1])
        total.append((torch.einsum("btgo,goi->btgi", left, sheets) * right).sum((1, 2, 3)))
    return torch.stack(total).sum(0)


def formed(parts: list[Factors], wide: int) -> Tensor:
    """The sums themselves, [B, O, I]; `wide` is O."""
    total: list[Tensor] = []
    dense = [part for part in parts if part.left.is_floating_point()]
    listed = [part for part in parts if not part.left.is_floating_point()]
    for part in [*([_join(dense)] if dense else []), *listed]:
        left, right = part.left, part.right
        if not left.is_floating_point():
            size, steps, high = right.shape
            table = right.new_zeros(size, wide, high)
            total.append(table.scatter_add_(1, left.unsqueeze(2).expand(size, steps, high), right))
        elif part.groups > 1:
            a, b = _blocks(left, part.groups), _blocks(right, part.groups)
            total.append(torch.einsum("btgo,btgi->bgoi", a, b).flatten(1, 2))
        elif right.shape[1] == 1:
            total.append(left.transpose(1, 2) * right)
        else:
            total.append(torch.bmm(left.transpose(1, 2), right))
    return total[0] if len(total) == 1 else torch.stack(total).sum(0)


def _wide(part: Factors) -> Factors:
    """In float32 at least: squares and sums of half precision would lose two digits of three."""
    if part.right.element_size() > 2:
        return part
    left = part.left.float() if part.left.is_floating_point() else part.left
    return Factors(left, part.right.float(), part.moving, part.groups)


def _join(parts: list[Factors]) -> Factors:
    if len(parts) == 1:
        return parts[0]
    left = torch.cat([part.left for part in parts], 1)
    right = torch.cat([part.right for part in parts], 1)
    return Factors(left, right, parts[0].moving, parts[0].groups)


def _blocks(value: Tensor, groups: int) -> Tensor:
    return value.reshape(*value.shape[:2], groups, -1)


def _power(value: Tensor) -> Tensor:
    """The squared norm by sample; one pass, nothing in between."""
    return torch.linalg.vector_norm(value.flatten(1), dim=1).square()


def _own(part: Factors) -> Tensor:
    left, right = part.left, part.right
    steps = right.shape[1]
    if not left.is_floating_point():
        if steps == 1:
            return _power(right)
        same = left.unsqueeze(1) == left.unsqueeze(2)
        return ((right @ right.transpose(1, 2)) * same).sum((1, 2))
    if part.groups > 1:
        return _own_grouped(part)
    wide, high = left.shape[2], right.shape[2]
    if steps == 1:
        return _power(left) * _power(right)
    # Products of positions with each other, or the gradient of a few samples at a time: what has fewer multiplications.
    if steps * (wide + high) <= wide * high:
        return ((left @ left.transpose(1, 2)) * (right @ right.transpose(1, 2))).sum((1, 2))
    size = left.shape[0]
    block = max(1, min(-(-size // _SHARE), _ELEMENTS // (wide * high)))
    found = [
        torch.linalg.vector_norm(torch.bmm(a.transpose(1, 2), b).flatten(1), dim=1).square()
        for a, b in zip(left.split(block), right.split(block), strict=True)
    ]
    return torch.cat(found)


def _own_grouped(part: Factors) -> Tensor:
    left, right = _blocks(part.left, part.groups), _blocks(part.right, part.groups)
    size, _, groups, wide = left.shape
    block = max(1, min(-(-size // _SHARE), _ELEMENTS // (groups * wide * right.shape[3])))
    found = [
        torch.einsum("btgo,btgi->bgoi", a, b).square().sum((1, 2, 3))
        for a, b in zip(left.split(block), right.split(block), strict=True)
    ]
    return torch.cat(found)


def _cross(dense: Factors, listed: Factors) -> Tensor:
    """Inner product of a gradient in dense factors with one in one-hot factors: a table read also by a matmul."""
    # left [B, T, O] at the listed rows [B, S] -> [B, T, S]
    index = listed.left.unsqueeze(1).expand(-1, dense.left.shape[1], -1)
    chosen = dense.left.gather(2, index)
    return (chosen * (dense.right @ listed.right.transpose(1, 2))).sum((1, 2))
