"""Hybridization between stages 2 and 3: the teacher's attention back in some layers."""

from mmmamba_cli.hybridize.attention_layers import (
    LayerSelection,
    choose_parent,
    hybridize,
    planned_product_name,
)

__all__ = ["LayerSelection", "choose_parent", "hybridize", "planned_product_name"]
