"""The shape of a model: `Architecture` is what one chooses, `ModelConfig` adds what the corpus decides."""

from dataclasses import asdict, dataclass

MODEL_FILES = ("config.json", "model.safetensors", "tokenizer.json", "SHA256SUMS")
"""The files of a saved model's folder; the sums are written last and promise the others."""


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """Layers and widths, apart from the vocabulary and the length, which come from the corpus.

    Raises:
        ValueError: naming the field and the value that does not fit.
    """

    n_layers: int = 12
    """Layers in all: first the two-stream layers, then the causal ones."""
    n_two_stream_layers: int = 6
    """Layers that carry content and query streams side by side (the paper: half of all)."""
    d_model: int = 768
    """Width of a token's representation."""
    n_heads: int = 12
    """Attention heads; each is d_model / n_heads wide, an even number for the rotary embedding."""
    d_prefix: int = 64
    """Width of the position table of prefix aggregation, an even number."""
    n_neighbours: int = 1
    """Positions on either side whose tokens, where they are known, enter the first query as they are; 0 is the paper's
    model, whose query has to fetch them (docs/model.md, section 2.1)."""

    def __post_init__(self) -> None:
        if not 1 <= self.n_two_stream_layers <= self.n_layers:
            raise ValueError(
                f"n_two_stream_layers must be between 1 and n_layers = {self.n_layers}, not {self.n_two_stream_layers}"
            )
        for name in ("d_model", "n_heads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.d_model % self.n_heads or (self.d_model // self.n_heads) % 2:
            raise ValueError(f"d_model = {self.d_model} must be an even multiple of n_heads = {self.n_heads}")
        if self.d_prefix < 2 or self.d_prefix % 2:
            raise ValueError(f"d_prefix must be an even number of at least 2, not {self.d_prefix}")
        if self.n_neighbours < 0:
            raise ValueError(f"n_neighbours must be at least 0, not {self.n_neighbours}")

    def model_config(self, vocab_size: int, max_length: int) -> "ModelConfig":
        """This architecture for a vocabulary of `vocab_size` entries and texts of up to `max_length` tokens."""
        shape = {name: getattr(self, name) for name in Architecture.__dataclass_fields__}
        return ModelConfig(**shape, vocab_size=vocab_size, max_length=max_length)


@dataclass(frozen=True, kw_only=True)
class ModelConfig(Architecture):
    """Everything `ARMD` needs to be built; saved as config.json beside the weights."""

    vocab_size: int
    """Entries of the vocabulary; token ids run from 0 to vocab_size - 1."""
    max_length: int
    """Longest text in tokens; positions run from 0 to max_length - 1."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("vocab_size", "max_length"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")

    def to_dict(self) -> dict[str, int]:
        """The fields, as config.json holds them."""
        return asdict(self)


ARCHITECTURES = {
    "tiny": Architecture(n_layers=4, n_two_stream_layers=2, d_model=128, n_heads=4, d_prefix=32),
    "small": Architecture(n_layers=12, n_two_stream_layers=6, d_model=768, n_heads=12, n_neighbours=0),
    "medium": Architecture(n_layers=24, n_two_stream_layers=12, d_model=1024, n_heads=16, n_neighbours=0),
}
"""Named shapes: `tiny` for tests and demonstrations, `small` (125M) and `medium` (345M) as in the paper."""
