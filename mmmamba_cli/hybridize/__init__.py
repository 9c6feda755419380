"""Between stages 2 and 3: put the teacher's attention back into some layers."""

from mmmamba_cli.hybridize.attention_layers import (
    choose_parent,
    hybridize,
    layer_stages,
    planned_product_name,
    product_name,
)

__all__ = ["choose_parent", "hybridize", "layer_stages", "planned_product_name", "product_name"]
