"""A folder of small tensors found by content, shared safely by several processes.

One safetensors file a result, written beside and renamed, so a reader sees a whole file or none.
A checksum inside makes a damaged file a miss.
"""

import hashlib
import logging
import os
from collections.abc import Mapping
from pathlib import Path

import platformdirs
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from urae.storage import write_shared

logger = logging.getLogger(__name__)


def find_cache_dir(kind: str) -> Path:
    """Return folder `kind` of `URAE_CACHE_DIR`, else of the user's cache folder for urae."""
    root = os.environ.get("URAE_CACHE_DIR") or platformdirs.user_cache_dir("urae")
    return Path(root) / kind


def content_key(weight: Tensor, purpose: str) -> str:
    """Hash a float32 tensor's shape and bytes together with what is computed from it."""
    digest = hashlib.sha256(f"{purpose}, shape {tuple(weight.shape)}\n".encode())
    digest.update(_float32_bytes(weight))
    return digest.hexdigest()


class ContentCache:
    """Results on disk under content keys; troubles are logged and never raised."""

    def __init__(self, cache_dir: Path) -> None:
        """Use a folder, which is created at the first result.

        Args:
            cache_dir: The folder; files of other names in it are left alone.
        """
        self.cache_dir = cache_dir
        self._writable = True  # until a write fails: one warning, not one a result

    def load(self, key: str) -> dict[str, Tensor] | None:
        """Load the float32 tensors stored under `key`, or `None` if absent or damaged."""
        path = self._path(key)
        try:
            with safe_open(path, framework="pt") as file:
                tensors = {name: file.get_tensor(name) for name in sorted(file.keys())}
                stored_checksum = (file.metadata() or {}).get("sha256")
            if stored_checksum != _checksum(tensors):
                raise ValueError("checksum differs")
        except FileNotFoundError:
            return None
        except (OSError, SafetensorError, ValueError) as error:
            logger.warning("cannot use cache file %s (%s); computing it again", path, error)
            return None
        return tensors

    def store(self, key: str, tensors: Mapping[str, Tensor]) -> None:
        """Store float32 CPU tensors under `key`, replacing what is there."""
        if not self._writable:
            return
        data = save(dict(tensors), metadata={"sha256": _checksum(tensors)})
        try:
            write_shared(self._path(key), data)
        except OSError as error:
            self._writable = False
            logger.warning(
                "cannot write to cache folder %s (%s); results are not kept; set URAE_CACHE_DIR "
                "to a writable folder to keep them",
                self.cache_dir,
                error,
            )

    def _path(self, key: str) -> Path:
        return self.cache_dir / f"{key}.safetensors"


def _checksum(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(f"{name} {tuple(tensors[name].shape)}\n".encode())
        digest.update(_float32_bytes(tensors[name]))
    return digest.hexdigest()


def _float32_bytes(tensor: Tensor) -> memoryview:
    return tensor.to("cpu", torch.float32).contiguous().numpy().data.cast("B")
