"""Where things are, and what is there."""

from pathlib import Path

TESTS = Path(__file__).parents[1]
REPOSITORY = TESTS.parent


def read_files(folder: Path) -> dict[str, bytes | str]:
    """Read every file below a folder."""
    return {
        str(path.relative_to(folder)): "link" if path.is_symlink() else path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() or path.is_symlink()
    }
