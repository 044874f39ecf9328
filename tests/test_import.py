"""What importing the package, and asking the command for help, does not import."""

from __future__ import annotations

import subprocess
import sys

import pytest

HEAVY = (
    "torch",
    "transformer_lens",
    "transformers",
    "accelerate",
    "numpy",
    "pandas",
    "scipy",
    "sklearn",
    "matplotlib",
    "pyarrow",
)
CODE = {
    "import": "import secondary_sinks",
    "names": "import secondary_sinks\nassert 'trace' in dir(secondary_sinks)",
    "aliases": "import secondary_sinks\nassert secondary_sinks.list_models()",
    "errors": "from secondary_sinks import InputError, ModelError",
    "help": "from secondary_sinks.cli.app import main\n"
    "sys.argv = ['secondary-sinks', '--help']\n"
    "try:\n    main()\nexcept SystemExit as done:\n    assert not done.code",
}


@pytest.mark.parametrize("what", CODE)
def test_nothing_heavy_is_imported(what):
    code = f"import sys\n{CODE[what]}\nprint('imported:', *({set(HEAVY)} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].strip() == "imported:"
