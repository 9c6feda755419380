"""Smoke test of an installation with a small random teacher: seed, hybridize, load, generate.

`make smoke` runs it; an installed wheel can be tried with it from anywhere:
python smoke.py --mmmamba PATH/TO/mmmamba
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from mmmamba_cli.cli.console import progress

SMALL_STACK = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def small_config() -> dict:
    """The 2.6 B architecture with small sizes."""
    from mmmamba_cli.checkpoint import hovle

    config = {**hovle.ARCHITECTURES["hovle-2.6b"], "force_image_size": 112}
    config["embedding_config"] = {
        **config["embedding_config"],
        **SMALL_STACK,
        "num_hidden_layers": 4,
        "image_size": 112,
        "img_context_token_id": 293,
        "llm_vocab_size": 300,
        "llm_hidden_size": 64,
    }
    config["llm_config"] = {
        **config["llm_config"],
        **SMALL_STACK,
        "num_hidden_layers": 8,
        "vocab_size": 300,
    }
    return config


def write_teacher(folder: Path) -> None:
    """A HoVLE with random weights in `folder`."""
    import torch
    from safetensors.torch import save_file

    from mmmamba_cli.checkpoint import hovle

    raw = small_config()
    name_map = hovle.name_map(raw, hovle.to_config(raw))
    rng = torch.Generator().manual_seed(0)
    tensors = {}
    for mapping in name_map:
        for name, shape in mapping.foreign.items():
            noise = torch.randn(shape, generator=rng) / max(shape[-1], 1) ** 0.5
            tensors[name] = 1 + 0.1 * noise if "norm" in name else noise
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(tensors, folder / "hovle.ckpt")
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(raw, indent=2))


def generate(folder: Path) -> list[int]:
    """Greedy tokens of a product, loaded with transformers' Auto class."""
    import torch
    from transformers import AutoModelForImageTextToText

    import mmmamba_cli.model  # noqa: F401  (registers the model)

    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    ids = torch.tensor([[1, 5, *[293] * 16, 7, 9]])
    pixels = torch.randn(1, 3, 112, 112, generator=torch.Generator().manual_seed(0))
    tokens = model.generate(ids, pixel_values=pixels, max_new_tokens=8, do_sample=False)
    return tokens[0, ids.shape[1] :].tolist()


def run(command: str, words: Sequence[str], folder: Path) -> int:
    """Run a command of mmmamba in `folder` and print its lines; return its exit code."""
    print(f"$ mmmamba {' '.join(words)}", flush=True)
    with (
        progress(f"mmmamba {words[0]}"),
        subprocess.Popen(
            [command, *words],
            cwd=folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding="utf-8",
            errors="replace",
        ) as process,
    ):
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
    return process.returncode


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mmmamba", default="mmmamba", help="the command to try")
    command = str(parser.parse_args().mmmamba)
    if Path(command).exists():
        command = str(Path(command).absolute())
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with progress("making a small random teacher"):
            write_teacher(folder)
        for words in (
            ["seed", "hovle.ckpt", "--recipe", "smoke", "--dtype", "fp32"],
            ["hybridize", "--attn-layers", "4"],
            ["status"],
        ):
            code = run(command, words, folder)
            if code:
                return code
        for product in ("seed", "hybrid-4"):
            with progress(f"loading {product}"):
                tokens = generate(folder / "runs/default/products" / product)
            print(f"{product} generates {tokens}", flush=True)
    print("the pipeline works on this machine")
    return 0


if __name__ == "__main__":
    sys.exit(main())
