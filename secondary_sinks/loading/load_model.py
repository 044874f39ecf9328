"""Load a causal language model from any source as a TransformerLens model.

The result always has *raw* weights: no layer norm folded in, no writing weights centered.
Centering changes residual vectors, their norms and their cosines, and these define a sink. The
tokens of a text do not change either: `model.tokenizer(text)` gives exactly the tokens of the
original tokenizer.

    model = load_model("smollm2-135m")                    # an alias; this one needs no hub
    model = load_model("Qwen/Qwen3-4B-Base", device="cuda", dtype=torch.bfloat16)   # a hub id
    model = load_model("./my-finetune")                   # a folder with safetensors
    model = load_model("checkpoint.Q4_K_M.gguf")          # dequantized once, then cached
    model = load_model(hf_model, tokenizer=tokenizer)     # a model in memory

Of a multimodal model the text model is taken (`loading.text_model`). Nothing is ever installed, and
only an alias or a hub id causes a download. Only safetensors and GGUF files are read, because a
pickled checkpoint can run code when it is opened.
"""

from __future__ import annotations

import copy
import os
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from secondary_sinks.errors import InputError, LoadError, ModelError
from secondary_sinks.loading.aliases import ALIASES, did_you_mean
from secondary_sinks.loading.cache import cache_folder, file_sha256
from secondary_sinks.loading.convert import convert_gguf, target_folder
from secondary_sinks.loading.fetch import fetch
from secondary_sinks.loading.hub import explained_errors, hub_options
from secondary_sinks.loading.messages import one_line, quiet_transformers
from secondary_sinks.loading.tokenizer import read_tokenizer, unchanged_tokenizer

if TYPE_CHECKING:
    import torch

_PICKLED = (".bin", ".pt", ".pth", ".ckpt")


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
            with `.`, `/` or `~` or ends in `.gguf` is always a path, and so is the name of an
            existing folder unless it is an alias. Of a multimodal model (Gemma 3, Mistral 3) the
            text model is taken.
        device: Device of the weights. None: "cuda" if available, else "cpu"; a model in memory
            stays where it is, including one that is divided over several devices.
        dtype: Number format of the weights. None: float32; a model in memory keeps its own.
        revision: Branch, tag or commit of a hub id.
        kind: "bridge" for a `TransformerBridge`; "hooked" for a `HookedTransformer`, which only
            TransformerLens 3 has.
        tokenizer: A Hugging Face tokenizer to use instead of the source's own; required for a
            model in memory. It is copied, not changed.
        trust_remote_code: Allow a hub repository or folder to run its own modeling code. If
            False, a model that needs it is refused.
        cache_dir: Folder for downloads from the package index and for converted `.gguf` files;
            default as in `cache_folder`. Hub downloads stay in the hub's own cache.
        progress: Whether to show progress bars (on standard error).

    Returns:
        A TransformerLens model: `cfg`, `tokenizer`, `to_tokens`, `run_with_hooks`,
        `run_with_cache`. A bridge takes over a model in memory **in place**: its modules are
        wrapped, its attention implementation becomes eager, and it should not be used by itself
        afterwards. A `HookedTransformer` may share its weights.

    Raises:
        InputError: `kind` is neither "bridge" nor "hooked".
        LoadError: the source is unknown, missing, pickled, truncated or incomplete; its tokenizer
            is missing; there is no network; the cache cannot be written.
        ModelError: not a causal language model; a multimodal one whose text model cannot be taken
            out; not known to TransformerLens, or wrapped by it so that it does not run; `device`
            or `dtype` for a divided model; `kind="hooked"` without TransformerLens 3, or for a
            model that it converts wrongly.

    Example:
        >>> model = load_model("smollm2-135m", progress=False)
        >>> model.cfg.n_layers
        30
    """
    if kind not in ("bridge", "hooked"):
        raise InputError(f"kind must be 'bridge' or 'hooked', got {kind!r}.")
    if kind == "hooked":
        from secondary_sinks.loading.hooked_transformer import require_hooked_transformer

        require_hooked_transformer()  # before spending minutes on the weights
    if isinstance(source, (str, os.PathLike)):
        name, folder, options = _locate(source, revision, cache_dir, progress)
        import torch

        options["trust_remote_code"] = trust_remote_code
        with quiet_transformers(progress):
            hf, tokenizer_of_source = _read(
                name, folder, dtype or torch.float32, tokenizer is None, options
            )
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    else:
        _check_in_memory(source, tokenizer)
        hf, tokenizer_of_source = source, None
        name = Path(getattr(hf.config, "_name_or_path", "") or type(hf).__name__).name
    if not _is_causal(type(hf).__name__):
        from secondary_sinks.loading.text_model import is_multimodal, text_model_of

        hf = text_model_of(name, hf) if is_multimodal(hf.config) else hf
    tokenizer = tokenizer_of_source if tokenizer is None else copy.deepcopy(tokenizer)
    hf = _placed(name, hf, device, dtype).eval()
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
        return alias.source, alias.source, hub_options(revision)
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
            f"{text!r} is not an alias, not a hub id (owner/name), and not an existing folder or "
            f".gguf file.{did_you_mean(text)} list_models() lists the aliases."
        )
    return text, text, hub_options(revision)


def _is_path(text: str) -> bool:
    return (
        text.startswith((".", "/", "~"))
        or text.lower().endswith(".gguf")
        or os.path.isabs(text)
        or os.path.isdir(text)
    )


def _folder_of_gguf(path: Path, cache_dir: str | os.PathLike[str] | None, progress: bool) -> Path:
    """The converted folder of a user's GGUF file, converted now if necessary."""
    if path.suffix.lower() != ".gguf":
        raise LoadError(
            f"{path} is a file, and only .gguf files are read as files. For safetensors, name the "
            "folder that holds them with their config.json."
        )
    try:
        digest = file_sha256(path)
    except OSError as error:
        raise LoadError(f"{path} cannot be read: {error}.") from error
    folder = target_folder(cache_folder(cache_dir), path.stem, digest)
    convert_gguf(path, folder, digest=digest, progress=progress)
    return folder


def _check_folder(folder: Path) -> None:
    """Raise unless the folder has a configuration and undamaged safetensors."""
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
            raise _damaged(path, error) from error


def _damaged(weights: Path | str, error: Exception) -> LoadError:
    return LoadError(
        f"{weights} is truncated or damaged ({one_line(error)}). Copy or download it again."
    )


def _read(
    name: str, folder: str, dtype: torch.dtype, with_tokenizer: bool, options: dict[str, Any]
) -> tuple[Any, Any]:
    """The Hugging Face model, on the CPU, and its tokenizer (None unless `with_tokenizer`)."""
    import transformers
    from safetensors import SafetensorError

    with explained_errors(folder, options):
        config = transformers.AutoConfig.from_pretrained(folder, **options)
    architecture = (config.architectures or [None])[0]
    _check_causal(name, config, architecture)
    model_class: Any = transformers.AutoModelForCausalLM
    if architecture and not _is_causal(architecture):
        model_class = getattr(transformers, architecture, model_class)  # multimodal
    # The tokenizer first, so that a missing one is noticed before the weights are loaded.
    tokenizer = read_tokenizer(folder, options) if with_tokenizer else None
    try:
        with explained_errors(folder, options):
            loaded: Any = model_class.from_pretrained(
                folder,
                config=config,
                dtype=dtype,
                use_safetensors=True,
                output_loading_info=True,
                **options,
            )
            model, report = loaded
    except SafetensorError as error:
        raise _damaged(f"A safetensors file of {folder}", error) from error
    # transformers fills missing weights with random numbers and only warns.
    if missing := sorted(report["missing_keys"]):
        raise LoadError(
            f"The weights in {folder} lack {len(missing)} tensors that config.json specifies, for "
            f"example {missing[0]}."
        )
    return model, tokenizer


def _check_in_memory(model: Any, tokenizer: Any) -> None:
    """Raise unless `model` is a causal language model from Hugging Face, with a tokenizer."""
    from transformers import PreTrainedModel

    if hasattr(model, "_orig_mod"):
        raise LoadError(
            "This model was wrapped by torch.compile; pass the model itself (model._orig_mod)."
        )
    if not isinstance(model, PreTrainedModel):
        raise LoadError(
            "source must be an alias, a hub id, a folder, a .gguf file or a Hugging Face model, "
            f"got {type(model).__name__}. A TransformerLens model is loaded already."
        )
    if tokenizer is None:
        raise LoadError(
            "A model in memory has no tokenizer: pass the one it was trained with, "
            "load_model(model, tokenizer=AutoTokenizer.from_pretrained(...))."
        )
    _check_causal(type(model).__name__, model.config, type(model).__name__)


def _check_causal(name: str, config: Any, architecture: str | None) -> None:
    """Raise unless the configuration is that of a decoder with causal attention."""
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    )

    from secondary_sinks.loading.text_model import is_multimodal

    other = None
    if getattr(config, "is_encoder_decoder", False):
        other = "an encoder-decoder"
    elif config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not getattr(
        config, "is_decoder", False
    ):
        # These families have a causal head too, but attend in both directions unless is_decoder.
        other = "an encoder"
    elif architecture is not None:
        if not _is_causal(architecture) and not is_multimodal(config):
            other = f"a {architecture}"
    elif config.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        other = f"of the type {config.model_type!r}"
    if other is not None:
        raise ModelError(
            f"{name} is {other}, not a causal language model. An attention sink is a token that "
            "later tokens attend to, so sinks are defined for causal attention only."
        )


def _is_causal(architecture: str) -> bool:
    return architecture.endswith(("ForCausalLM", "LMHeadModel"))


def _placed(name: str, hf: Any, device: Any, dtype: torch.dtype | None) -> Any:
    """The model on `device` and in `dtype`; unchanged where both are None."""
    if device is None and dtype is None:
        return hf
    devices = {str(place) for place in (getattr(hf, "hf_device_map", None) or {}).values()}
    if len(devices) > 1 or "disk" in devices:
        raise ModelError(
            f"{name} is divided over {', '.join(sorted(devices))} and cannot be moved. Leave out "
            "device and dtype, and choose them where the model is loaded (from_pretrained, "
            "dispatch_model)."
        )
    return hf.to(device=device, dtype=dtype)


def _wrap(name: str, hf: Any, tokenizer: Any, kind: str, progress: bool) -> Any:
    """The TransformerLens model of a Hugging Face model that is on its device already."""
    # TransformerLens goes by this name. It may be missing, or that of a multimodal model.
    hf.config.architectures = [type(hf).__name__]
    weight = next(hf.parameters())
    with quiet_transformers(progress), unchanged_tokenizer(tokenizer):
        if kind == "hooked":
            from secondary_sinks.loading.hooked_transformer import to_hooked

            model = to_hooked(hf, tokenizer, weight.device, weight.dtype)
            model.cfg.model_name = name
        else:
            from transformer_lens.model_bridge import TransformerBridge

            from secondary_sinks.loading.check_wrapped import check_wrapped, probe_logits

            _warn_of_eager_alibi(name, hf)
            expected = probe_logits(name, hf)
            base = hf.base_model
            has_rotary = getattr(base, "rotary_emb", base) is not None
            try:
                model = TransformerBridge.boot_transformers(
                    name, hf_model=hf, tokenizer=tokenizer, device=weight.device, dtype=weight.dtype
                )
            except (ValueError, NotImplementedError, AttributeError, KeyError) as error:
                raise ModelError(
                    f"TransformerLens cannot wrap {name} ({type(hf).__name__}): {one_line(error)}"
                ) from error
            if not has_rotary:  # TransformerLens puts an empty one there (Granite 4)
                base.rotary_emb = None
            model.eval()
            check_wrapped(name, model, expected)
    # By default TransformerLens puts a BOS token before every text. A model that was trained
    # without one (Qwen2.5, SmolLM2) would get a first token that is unlike any in its training,
    # and may then have no primary sink.
    model.cfg.default_prepend_bos = tokenizer.bos_token_id in tokenizer("a").input_ids[:1]
    return model


def _warn_of_eager_alibi(name: str, hf: Any) -> None:
    """Warn if the eager attention of a Falcon with ALiBi differs from its fast attention.

    transformers 5.23 adds the position bias twice in eager attention, which a bridge needs, and
    once in its fast attention (SDPA). Both are compared on a few tokens.
    """
    if hf.config.model_type != "falcon" or not hf.config.alibi:
        return
    import torch

    tokens = torch.arange(8, device=next(hf.parameters()).device)[None]
    implementation = hf.config._attn_implementation_internal
    logits = {}
    try:
        with torch.no_grad():
            for attention in ("eager", "sdpa"):
                hf.config._attn_implementation_internal = attention
                logits[attention] = hf(tokens, use_cache=False).logits.float()
    finally:
        hf.config._attn_implementation_internal = implementation
    if (logits["eager"] - logits["sdpa"]).norm() > 0.01 * logits["sdpa"].norm():
        warnings.warn(
            f"{name}: transformers' eager attention, which TransformerLens reads, differs from its "
            "fast attention (SDPA), because it adds the position bias twice. The measured "
            "activations are not those of the model as it was trained.",
            stacklevel=4,
        )
