"""What judging a model needs beyond training one: scikit-learn, SciPy and LightGBM, the extra `judge`."""

import importlib

from hf_plm.config import UserError

PACKAGES = ("sklearn", "scipy", "lightgbm")


def require_judge(*packages: str) -> None:
    """Raises `UserError` where one of these packages (none named: of `PACKAGES`) cannot be imported."""
    for package in packages or PACKAGES:
        try:
            importlib.import_module(package)
        except ImportError as error:
            raise UserError(
                f"This needs {package}, which cannot be imported ({str(error).splitlines()[0]}): "
                'pip install "hf_plm[judge]".'
            ) from None
        except OSError as error:  # LightGBM without libgomp
            raise UserError(f"{package} is installed but cannot be loaded: {error}") from None
