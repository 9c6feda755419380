"""The mixers of a layer, one module each; a module registers its class with `register_mixer`."""
