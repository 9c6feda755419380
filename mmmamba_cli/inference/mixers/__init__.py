"""The mixers over packed weights, one module each: `pack` makes a `PackedMixer` of a module."""
