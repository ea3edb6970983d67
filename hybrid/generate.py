"""Continue a text with a trained model: ``python -m hybrid.generate CHECKPOINT --prompt "ROMEO:"``."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from hybrid.arguments import Parser, describe, fail
from hybrid.config import ConfigError, from_yaml
from hybrid.data import DataError, Tokenizer, load_tokenizer
from hybrid.schema import Config, KernelsConfig

if TYPE_CHECKING:
    import torch

    from hybrid.model import HybridLM


def main(arguments: list[str] | None = None) -> None:
    parser = Parser(prog="python -m hybrid.generate", description=__doc__)
    parser.add_argument("checkpoint", type=Path, help="a run's folder (its best weights) or a .safetensors file in it")
    parser.add_argument("--prompt", default="\n", help="text to continue (default: a line break)")
    parser.add_argument("--tokens", type=int, default=500, help="how many tokens to add (default 500)")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 takes the likeliest token (default 0.8)")
    parser.add_argument("--top-k", type=int, default=0, help="draw from the k likeliest tokens only (default: all)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"], help="default cpu")
    options = parser.parse_args(arguments)
    try:
        if options.tokens < 0 or not 0 <= options.temperature < float("inf") or options.top_k < 0:
            raise ConfigError("--tokens, --temperature and --top-k must be finite and not negative")
        if not 0 <= options.seed < 2**63:
            raise ConfigError(f"--seed must be from 0 to 2^63 - 1, got {options.seed}")
        if not options.prompt:
            raise ConfigError("--prompt is empty; the model needs at least one token to begin with")
        cfg, tokenizer, weights = find(options.checkpoint)
        prompt = tokenizer.encode(options.prompt).tolist()
        model = load(cfg, weights, options.device)
    except (ConfigError, DataError) as error:
        fail(str(error))
    except OSError as error:
        fail(describe(error))
    sys.stdout.write(options.prompt)
    text = Decoder(tokenizer)
    try:
        for token in generate(model, prompt, options.tokens, options.temperature, options.top_k, options.seed):
            sys.stdout.write(text.add(token))
            sys.stdout.flush()
        sys.stdout.write(text.rest() + "\n")
    except (KeyboardInterrupt, BrokenPipeError):
        sys.exit(130)


def find(checkpoint: Path) -> tuple[Config, Tokenizer, Path]:
    """Configuration, tokenizer and weights that belong together. Raises ``ConfigError`` or ``DataError``."""
    if not checkpoint.exists():
        raise ConfigError(f"{checkpoint} does not exist; give a run's folder, e.g. outputs/single/NAME")
    folder = checkpoint if checkpoint.is_dir() else checkpoint.parent
    if folder.name == "checkpoints":
        folder = folder.parent
    if not (folder / "config.yaml").exists():
        raise ConfigError(f"{folder} is no run folder: it has no config.yaml")
    weights = checkpoint if checkpoint.is_file() else folder / "checkpoints" / "best.safetensors"
    if not weights.is_file():
        raise ConfigError(f"{folder} has no weights yet (checkpoints/best.safetensors)")
    return from_yaml(folder / "config.yaml"), load_tokenizer(folder / "tokenizer.json"), weights


def load(cfg: Config, weights: Path, device: str) -> HybridLM:
    """The trained model on ``device``, in evaluation mode. Raises ``ConfigError`` for weights that do not fit."""
    import torch
    from safetensors import SafetensorError

    from hybrid import build_model
    from hybrid.training.checkpoint import load_weights

    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigError(f"--device {device}: there is no CUDA device here")
    cfg.kernels = KernelsConfig()  # those of the training machine may not be here
    model = build_model(cfg)
    try:
        load_weights(model, weights)
    except (RuntimeError, SafetensorError) as error:
        raise ConfigError(f"{weights} does not hold this model's weights: {str(error).splitlines()[0]}") from error
    return model.to(device).eval()


def generate(
    model: HybridLM, prompt: list[int], tokens: int, temperature: float = 0.8, top_k: int = 0, seed: int = 0
) -> Iterator[int]:
    """Yield ``tokens`` new token ids one by one; the state is carried, so each costs the same however long the text."""
    import torch

    device = model.embedding.weight.device
    generator = torch.Generator(device).manual_seed(seed)
    with torch.inference_mode():
        logits, state = model(torch.tensor([prompt], device=device), model.initial_state(1))
        for position in range(tokens):
            token = pick(logits[0, -1].float(), temperature, top_k, generator)
            yield token
            if position + 1 < tokens:
                logits, state = model(torch.tensor([[token]], device=device), state)


def pick(logits: torch.Tensor, temperature: float, top_k: int, generator: torch.Generator) -> int:
    import torch

    if temperature == 0:
        return int(logits.argmax())
    if 0 < top_k < len(logits):
        logits = logits.masked_fill(logits < logits.topk(top_k).values[-1], -torch.inf)
    scaled = (logits.double() - logits.max()) / temperature  # however small it is, the largest stays 0
    return int(torch.multinomial(scaled.softmax(-1), 1, generator=generator))


class Decoder:
    """Text of a token stream. A token may end inside a character, so text is held back until it is whole."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.held: list[int] = []

    def add(self, token: int) -> str:
        self.held.append(token)
        text = self.tokenizer.decode(self.held)
        if text.endswith("\ufffd") and len(self.held) < 4:
            return ""
        self.held.clear()
        return text

    def rest(self) -> str:
        return self.tokenizer.decode(self.held) if self.held else ""


if __name__ == "__main__":
    main()
