"""Documented objects for small quickstarts."""

from grit_jax.quickstart.docstrings import DocumentedObject


def documented(count):
    """Functions of three kinds, in five modules."""
    kinds = ("sorts numbers", "opens files", "draws lines")
    return [
        DocumentedObject(
            f"m{number % 5}.f{number}", f"m{number % 5}.f{number}(x)", f"This {kinds[number % 3]} for case {number}.",
            f"In case {number} it {kinds[number % 3]} with care. Case {number} is special in many ways.",
        )
        for number in range(count)
    ]  # fmt: skip
