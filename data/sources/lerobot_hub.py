"""Where a LeRobot dataset is: a folder, or what the Hugging Face hub has under a name."""

import re
from collections.abc import Iterable
from pathlib import Path

from ..episodes import DataError
from .lerobot_metadata import first_line

HUB_NAME = r"[\w][\w.-]*/[\w][\w.-]*"
OTHER_FORMATS = (".hdf5", ".h5")


def is_lerobot(path: Path | str) -> bool:
    """Whether `path` is the folder of a LeRobot dataset (of any version), or is not there and reads like a name on the hub."""
    if Path(path).exists():
        return (Path(path) / "meta" / "info.json").is_file()
    return bool(re.fullmatch(HUB_NAME, str(path))) and not str(path).endswith(OTHER_FORMATS)


def local_folder(path: str, wanted: Iterable[str]) -> Path:
    """The folder itself, or the hub's copy on this machine, where the files that match `wanted` are downloaded first.

    Without a network what an earlier download left is taken, whole or not. Raises `DataError` if there is nothing."""
    if Path(path).exists():
        return Path(path)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(path, repo_type="dataset", allow_patterns=list(wanted)))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise DataError(
            f"there is no folder {path}, and the hub cannot give a dataset of that name ({first_line(error)}); give the folder of a "
            f"LeRobot dataset, or download one where there is a network: {download_command(path)}"
        ) from error


def check_files(path: str, folder: Path, files: Iterable[str]) -> None:
    """Raises `DataError` with the first of `files` that is missing and with what to type."""
    missing = [file for file in files if not (folder / file).is_file()]
    if not missing:
        return
    unfinished = _unfinished(folder)
    raise DataError(
        f"{folder} lacks {missing[0]}"
        + (f" and {len(missing) - 1} more of its files" if len(missing) > 1 else "")
        + (f" ({unfinished.name} was never finished)" if unfinished else "")
        + f": the download or the copy was cut short; get the rest: {download_command(path)}"
    )


def download_command(path: str) -> str:
    """What to type to get, or go on getting, the dataset."""
    if Path(path).exists():
        return f"hf download OWNER/NAME --repo-type dataset --local-dir {path}"
    return f"hf download {path} --repo-type dataset"


def _unfinished(folder: Path) -> Path | None:
    """What an interrupted download left: inside a folder, or in the hub's cache beside its snapshots."""
    place = folder.parents[1] / "blobs" if folder.parent.name == "snapshots" else folder
    return next(iter(sorted(place.rglob("*.incomplete"))), None)
