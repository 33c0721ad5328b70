"""As in the tests of the models."""

from tests.models.conftest import quick_compilation

__all__ = ["quick_compilation"]
