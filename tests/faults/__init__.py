"""Seeded faults: a text of the code, what replaces it, and tests that must notice."""

from tests.faults import library, models, programs

FAULTS = library.FAULTS + models.FAULTS + programs.FAULTS
