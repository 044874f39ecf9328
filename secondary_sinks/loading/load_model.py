"""Load a causal language model, from wherever it is, as a TransformerLens model.

Whatever the source, the result has *raw* weights: nothing folded into anything, nothing centered.
Centering the writing weights changes residual vectors, their norms and their cosines, and those
are what a sink is defined by. The tokens of a text do not change either: `model.tokenizer(text)`
gives exactly the tokens that the original tokenizer gives.

    model = load_model("smollm2-135m")                    # an alias; this one needs no hub
    model = load_model("Qwen/Qwen3-4B-Base", device="cuda", dtype=torch.bfloat16)   # a hub id
    model = load_model("./my-finetune")                   # a folder with safetensors
    model = load_model("checkpoint.Q4_K_M.gguf")          # dequantized once, then cached
    model = load_model(hf_model, tokenizer=tokenizer)     # a model in memory

Only an alias or a hub id downloads anything. Only safetensors and GGUF are read: a pickled
checkpoint can run code when it is opened.
"""

from __future__ import annotations

import copy
import os
import socket
import urllib.request
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import urlsplit

from secondary_sinks.errors import LoadError, ModelError
from secondary_sinks.loading.aliases import ALIASES
from secondary_sinks.loading.aliases import list_models as list_models
from secondary_sinks.loading.convert import converted_folder, one_line, quiet_transformers
from secondary_sinks.loading.fetch import cache_folder, did_you_mean, fetch, file_sha256
from secondary_sinks.loading.tokenizer import kept_as_it_is, read_tokenizer

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch

_PICKLED = (".bin", ".pt", ".pth", ".ckpt")

_WITHOUT_A_HUB = (
    "Without a hub these work: the aliases qwen2.5-coder-0.5b and smollm2-135m, a local folder, "
    "a .gguf file, and a model in memory."
)


def load_model(
    source: Any,
    *,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    revision: str | None = None,
    kind: Literal["bridge", "hooked"] = "bridge",
    tokenizer: Any = None,
    trust_remote_code: bool = False,
    cache_dir: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> Any:
    """Load a model and its tokenizer, in eval mode and with raw weights.

    Args:
        source: An alias (see `list_models`), a hub id such as `"Qwen/Qwen3-4B-Base"`, a folder
            with safetensors, a `.gguf` file, or a Hugging Face model in memory. Text that begins
            with `.`, `/` or `~` or ends in `.gguf` is always a path, and so is any existing
            folder that no alias shares its name with.
        device: Where to put the weights. None: "cuda" if there is one, else "cpu"; a model in
            memory stays where it is, also one that is divided over several devices.
        dtype: Of the weights. None: float32; a model in memory keeps its own.
        revision: Branch, tag or commit of a hub id.
        kind: "bridge" for a `TransformerBridge`; "hooked" for a `HookedTransformer`, which only
            TransformerLens 3 has.
        tokenizer: A Hugging Face tokenizer to use in place of the source's own. A model in memory
            has none, so it needs one. Yours is copied, not changed.
        trust_remote_code: Let a hub repository or folder run its own modeling code. Off, a
            model that needs it is refused.
        cache_dir: Folder for what is downloaded from the package index and for converted `.gguf`
            files; default as in `cache_folder`. Hub downloads stay in the hub's own cache.
        progress: Whether to show progress bars (on standard error).

    Returns:
        A TransformerLens model: `cfg`, `tokenizer`, `to_tokens`, `run_with_hooks`,
        `run_with_cache`. A bridge takes a model in memory over **in place**: its modules are
        wrapped, its attention implementation becomes eager, and it should not be used by itself
        afterwards. A `HookedTransformer` may share its weights.

    Raises:
        LoadError: the source is unknown, missing, pickled, truncated or incomplete; its tokenizer
            is missing; there is no network; the cache cannot be written.
        ModelError: not a causal language model; not known to TransformerLens; `kind="hooked"`
            without TransformerLens 3, or for a model that it converts wrongly.
    """
    if kind not in ("bridge", "hooked"):
        raise ModelError(f"kind must be 'bridge' or 'hooked', not {kind!r}.")
    if kind == "hooked":
        from secondary_sinks.loading.hooked_transformer import require_hooked_transformer

        require_hooked_transformer()  # before minutes are spent on the weights
    if isinstance(source, (str, os.PathLike)):
        name, folder, options = _locate(source, revision, cache_dir, progress)
        import torch

        options["trust_remote_code"] = trust_remote_code
        with quiet_transformers(progress):
            hf, own = _read(name, folder, dtype or torch.float32, tokenizer is None, options)
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    else:
        name, hf, own = _in_memory(source, tokenizer)
    tokenizer = own if tokenizer is None else copy.deepcopy(tokenizer)
    if device is not None or dtype is not None:
        places = sorted(
            {str(place) for place in (getattr(hf, "hf_device_map", None) or {}).values()}
        )
        if len(places) > 1 or "disk" in places:
            raise ModelError(
                f"{name} is divided over {', '.join(places)} and stays there; leave device and "
                "dtype out, and choose them where it is loaded (from_pretrained, dispatch_model)."
            )
        hf = hf.to(device=device, dtype=dtype)
    from secondary_sinks.host.condition import warn_of_eager_alibi

    warn_of_eager_alibi(hf.eval(), name)
    return _wrap(name, hf, tokenizer, kind, progress)


def _locate(
    source: str | os.PathLike[str],
    revision: str | None,
    cache_dir: str | os.PathLike[str] | None,
    progress: bool,
) -> tuple[str, str, dict[str, Any]]:
    """The model's name, its folder or hub id, and options for transformers."""
    text = os.fspath(source)
    alias = ALIASES.get(text.lower()) if isinstance(source, str) else None
    if alias is not None and not alias.needs_hub:
        folder = fetch(alias.name, cache_dir, progress)
        return alias.name, str(folder), {"local_files_only": True}
    if alias is not None:
        return alias.source, alias.source, _hub_options(revision)
    if not isinstance(source, str) or _is_path(text):
        path = Path(text).expanduser()
        if not path.exists():
            raise LoadError(f"There is no file or folder {text!r}.{did_you_mean(path.name)}")
        if path.is_file():
            path = _folder_of_gguf(path, cache_dir, progress)
        _check_folder(path)
        return path.absolute().name, str(path), {"local_files_only": True}
    if text.count("/") != 1:
        raise LoadError(
            f"{text!r} is not an alias, not a hub id (owner/name) and not a folder or .gguf file "
            f"that exists.{did_you_mean(text)} list_models() lists the aliases."
        )
    return text, text, _hub_options(revision)


def _is_path(text: str) -> bool:
    return (
        text.startswith((".", "/", "~"))
        or text.lower().endswith(".gguf")
        or os.path.isabs(text)
        or os.path.isdir(text)
    )


def _folder_of_gguf(path: Path, cache_dir: str | os.PathLike[str] | None, progress: bool) -> Path:
    if path.suffix.lower() != ".gguf":
        raise LoadError(
            f"{path} is a file, and only .gguf files are read as files. For safetensors, name the "
            "folder that holds them with their config.json."
        )
    try:
        digest = file_sha256(path)
    except OSError as error:
        raise LoadError(f"{path} cannot be read: {error}.") from error
    return converted_folder(
        path, cache_folder(cache_dir), name=path.stem, digest=digest, progress=progress
    )


def _check_folder(folder: Path) -> None:
    """Raise unless the folder has a configuration and sound safetensors."""
    from safetensors import SafetensorError, safe_open

    if not (folder / "config.json").is_file():
        files = sorted(path.name for path in folder.glob("*.gguf"))
        hint = f" Load its .gguf file instead: {str(folder / files[0])!r}." if files else ""
        raise LoadError(f"The folder {folder} has no config.json, so it holds no model.{hint}")
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        pickled = sorted(path.name for path in folder.iterdir() if path.suffix in _PICKLED)
        if pickled:
            raise LoadError(
                f"The folder {folder} only has pickled weights ({', '.join(pickled)}), which can "
                "run code when they are opened and are not read. If you trust them, load the "
                "model with transformers, save it with save_pretrained (it writes safetensors), "
                "and name that folder."
            )
        raise LoadError(f"The folder {folder} has no *.safetensors file, so it holds no weights.")
    for path in weights:
        try:
            with safe_open(path, framework="pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise LoadError(
                f"{path} is truncated or damaged ({one_line(error)}). Copy or download it again."
            ) from error


def _hub_options(revision: str | None) -> dict[str, Any]:
    """Options for the hub; without a network only what is already cached is looked for.

    Left to itself the hub's client retries an unreachable host for half a minute.
    """
    from huggingface_hub import constants

    offline = constants.HF_HUB_OFFLINE
    if not offline and not urllib.request.getproxies():
        address = urlsplit(constants.ENDPOINT)
        try:
            socket.getaddrinfo(address.hostname, address.port or 443)
        except OSError:
            offline = True
    return {"revision": revision, "local_files_only": offline}


def fetch_from_hub(source: str, *, revision: str | None = None, progress: bool = True) -> Path:
    """Download safetensors, configuration and tokenizer of a hub repository into the hub's cache.

    Raises:
        LoadError: no network, no such repository, or no access to it.
    """
    from huggingface_hub import snapshot_download

    options = _hub_options(revision)
    wanted = ["*.safetensors", "*.json", "*.jinja", "*.txt", "*.model"]
    # Some repositories hold the weights a second time, in another layout.
    doubled = ["consolidated*", "original/*", "metal/*"]
    with quiet_transformers(progress), _hub_errors(source, options):
        folder = snapshot_download(
            source, allow_patterns=wanted, ignore_patterns=doubled, **options
        )
    return Path(folder)


@contextmanager
def _hub_errors(source: str, options: dict[str, Any]) -> Iterator[None]:
    """Turn what the block raises about a source into a `LoadError` with a way out."""
    try:
        yield
    except (OSError, ValueError, ImportError, RuntimeError) as error:
        raise _explained(source, error, options) from error


def _explained(source: str, error: Exception, options: dict[str, Any]) -> LoadError:
    causes: list[BaseException] = [error]
    while (cause := causes[-1].__cause__ or causes[-1].__context__) and cause not in causes:
        causes.append(cause)
    names = {type(cause).__name__ for cause in causes}
    text = one_line(error)
    if "trust_remote_code" in str(error):
        return LoadError(
            f"{source!r} wants to run modeling code of its own. If you have read it and trust "
            "it, pass trust_remote_code=True."
        )
    if os.path.isdir(source):
        return LoadError(f"The model in {source} could not be read: {text}")
    if "GatedRepoError" in names:
        return LoadError(
            f"{source!r} is gated: accept its license on the hub and log in with `hf auth login`."
        )
    if "RevisionNotFoundError" in names:
        return LoadError(f"{source!r} has no revision {options.get('revision')!r} on the hub.")
    if "RepositoryNotFoundError" in names:
        return LoadError(
            f"The hub has no repository {source!r}, or it is private.{did_you_mean(source)}"
        )
    offline = {"LocalEntryNotFoundError", "OfflineModeIsEnabled", "ConnectError"}
    if options.get("local_files_only") or names & offline:
        return LoadError(
            f"{source!r} is not in the hub's cache on this machine, and the hub cannot be reached "
            f"(no network, or offline mode).{did_you_mean(source)} {_WITHOUT_A_HUB}"
        )
    if "safetensors" in text:
        return LoadError(
            f"{source!r} offers no safetensors; pickled weights can run code when they are opened "
            f"and are not read. ({text})"
        )
    return LoadError(f"{source!r} could not be loaded: {text}")


def _read(
    name: str, folder: str, dtype: torch.dtype, with_tokenizer: bool, options: dict[str, Any]
) -> tuple[Any, Any]:
    """The Hugging Face model, on the CPU, and its tokenizer (None where not asked for)."""
    from safetensors import SafetensorError
    from transformers import AutoConfig, AutoModelForCausalLM

    with _hub_errors(folder, options):
        config = AutoConfig.from_pretrained(folder, **options)
    _check_causal(name, config, (config.architectures or [None])[0])
    # The tokenizer first: its absence should not cost the time of loading the weights.
    tokenizer = read_tokenizer(folder, options) if with_tokenizer else None
    try:
        with _hub_errors(folder, options):
            model, report = AutoModelForCausalLM.from_pretrained(
                folder,
                config=config,
                dtype=dtype,
                use_safetensors=True,
                output_loading_info=True,
                **options,
            )
    except SafetensorError as error:
        raise LoadError(
            f"A safetensors file of {folder} is truncated or damaged ({one_line(error)}). Copy or "
            "download it again."
        ) from error
    # transformers fills absent weights with random numbers and only warns.
    if absent := sorted(report["missing_keys"]):
        raise LoadError(
            f"The weights in {folder} lack {len(absent)} tensors that config.json promises, for "
            f"example {absent[0]}."
        )
    return model, tokenizer


def _in_memory(model: Any, tokenizer: Any) -> tuple[str, Any, None]:
    """Name and model of a Hugging Face model in memory, checked."""
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        raise LoadError(
            "source must be an alias, a hub id, a folder, a .gguf file or a Hugging Face model, "
            f"not {type(model).__name__}. A TransformerLens model is loaded already."
        )
    if tokenizer is None:
        raise LoadError(
            "A model in memory has no tokenizer: pass the one it was trained with, "
            "load_model(model, tokenizer=AutoTokenizer.from_pretrained(...))."
        )
    _check_causal(type(model).__name__, model.config, type(model).__name__)
    name = getattr(model.config, "_name_or_path", "") or type(model).__name__
    return Path(name).name, model, None


def _check_causal(name: str, config: Any, architecture: str | None) -> None:
    """Raise unless the configuration is that of a decoder that only looks back."""
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    )

    what = None
    if getattr(config, "is_encoder_decoder", False):
        what = "an encoder-decoder"
    elif config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not getattr(
        config, "is_decoder", False
    ):
        # These families have a causal head too, but attend in both directions unless is_decoder.
        what = "an encoder"
    elif architecture is not None:
        if not architecture.endswith(("ForCausalLM", "LMHeadModel")):
            what = f"a {architecture}"
    elif config.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        what = f"of the type {config.model_type!r}"
    if what is not None:
        raise ModelError(
            f"{name} is {what}, not a causal language model. Only in those does every later token "
            "look back at the first ones, so only they have sinks in this sense."
        )


def _wrap(name: str, hf: Any, tokenizer: Any, kind: str, progress: bool) -> Any:
    """The TransformerLens model around a Hugging Face model that is on its device already."""
    if not hf.config.architectures:
        hf.config.architectures = [type(hf).__name__]
    place = next(hf.parameters())
    with quiet_transformers(progress), kept_as_it_is(tokenizer):
        if kind == "hooked":
            from secondary_sinks.loading.hooked_transformer import to_hooked

            model = to_hooked(hf, tokenizer, place.device, place.dtype)
            model.cfg.model_name = name
            _follow_tokenizer(model, tokenizer)
            return model
        from transformer_lens.model_bridge import TransformerBridge

        try:
            model = TransformerBridge.boot_transformers(
                name, hf_model=hf, tokenizer=tokenizer, device=place.device, dtype=place.dtype
            )
        except (ValueError, NotImplementedError, AttributeError, KeyError) as error:
            raise ModelError(
                f"TransformerLens cannot wrap {name} ({type(hf).__name__}): {error}"
            ) from error
    _follow_tokenizer(model, tokenizer)
    model.eval()
    return model


def _follow_tokenizer(model: Any, tokenizer: Any) -> None:
    """Let `to_tokens` put a BOS token in front of a text if, and only if, the tokenizer does.

    TransformerLens always does by default. A model that never saw it there (Qwen2.5, SmolLM2) then
    has a first token that is unlike any of its training, and may have no primary sink at all.
    """
    ids = tokenizer("a").input_ids
    model.cfg.default_prepend_bos = tokenizer.bos_token_id in ids[:1]
