"""How the page is served."""

from dataclasses import dataclass
from pathlib import Path

from urae.adapters.packaged import BASE
from urae.choices import Memory, Speed
from urae.config import check_types


@dataclass(frozen=True)
class WebConfig:
    """A page on this machine."""

    model: str = BASE
    """Chosen when the page opens; any other can be typed there."""
    output_dir: Path = Path("outputs")
    """Folder for the pictures, a folder of its own for each click."""
    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 lets other machines in, who can then read local models."""
    port: int = 7860
    """To listen on."""
    open_browser: bool = True
    """Open the page when it is ready."""
    memory: Memory = "auto"
    """As in `GenerateConfig`."""
    speed: Speed = "exact"
    """As in `GenerateConfig`."""

    def __post_init__(self) -> None:
        check_types(self)
        if not self.host:
            raise ValueError("host is empty; give an address, such as 127.0.0.1")
        if not 0 < self.port < 2**16:
            raise ValueError(f"port {self.port} must be between 1 and 65535")
        if self.output_dir.exists() and not self.output_dir.is_dir():
            raise FileExistsError(
                f"output {self.output_dir} is a file; choose a folder with --output"
            )
