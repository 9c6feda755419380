"""The mixers as plain values, one module each; every module here registers a `MixerSpec`."""
