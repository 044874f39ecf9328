"""Attention sinks in language models: which tokens they are, which MLP made each, what they change.

>>> import secondary_sinks as ss
>>> model = ss.load_model("qwen2.5-coder-0.5b")
>>> sink_map = ss.detect_sinks(model, "...", chat=True)
>>> ss.attribute_to_mlps(model, sink_map).to_frame()

The public names are listed in `__init__.pyi`. They are imported when they are first used, so that
importing the package costs next to nothing.
"""

import lazy_loader

__version__ = "0.1.0"

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
__all__ += ["__version__"]
