"""Parameter shapes that mixers share with the attention of a teacher."""

from __future__ import annotations

from mmmamba_cli.architecture.sizes import StackConfig


def projection_shapes(stack: StackConfig, hidden: int) -> dict[str, tuple[int, ...]]:
    """W_Q, W_K, W_V and W_O, with their biases."""
    wide, narrow = stack.num_heads * stack.head_dim, stack.num_kv_heads * stack.head_dim
    rows = {"q_proj": (wide, hidden), "k_proj": (narrow, hidden), "v_proj": (narrow, hidden)}
    shapes: dict[str, tuple[int, ...]] = {}
    for name, shape in rows.items():
        shapes[f"{name}.weight"] = shape
        if stack.qkv_bias:
            shapes[f"{name}.bias"] = shape[:1]
    shapes["o_proj.weight"] = (hidden, wide)
    if stack.output_bias:
        shapes["o_proj.bias"] = (hidden,)
    return shapes


def qk_norm_shapes(head_dim: int) -> dict[str, tuple[int, ...]]:
    return {"q_norm.weight": (head_dim,), "k_norm.weight": (head_dim,)}
