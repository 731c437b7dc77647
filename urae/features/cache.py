"""The cache job: a folder of captioned images to latents and prompt embeddings beside them."""

import json
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path

from PIL import Image

from urae.backbones.devices import name_dtype
from urae.backbones.flux import MAX_TEXT_TOKENS, fetch_model, read_text_tokens
from urae.backbones.free_memory import explain_memory
from urae.config import check_types
from urae.features.buckets import covers, fit, pick_bucket
from urae.features.claims import Claims
from urae.features.encoders import Encoders
from urae.features.images import (
    ImageError,
    decode_image,
    list_picture_stems,
    read_image,
    read_size,
)
from urae.features.sources import NO_CAPTION, Skip, Source, find_sources
from urae.features.store import (
    EMBED_SUFFIX,
    FORMAT_KEY,
    FORMAT_VERSION,
    WORK_DIR,
    Fingerprints,
    Status,
    digest,
    empty_prompt_path,
    find_owner,
    find_status,
    fingerprint_encoders,
    latent_path,
    list_cached_stems,
    write_features,
)
from urae.geometry import check_side
from urae.storage import write_atomic

REPORT_NAME = "cache_report.json"

Progress = Callable[[str, int, int], None]
"""Called with the stage (`inspect`, `captions`, `images`), what is done of it, and its total."""


@dataclass(frozen=True)
class CacheConfig:
    """What to cache, with which model and for which resolution."""

    data_dir: Path
    """Folder of images with their captions; the features are written beside them."""
    model: str
    """Base: a name as flux-dev or miniature-dev, a hub id, a folder or a .safetensors file."""
    resolution: int
    """Side in pixels of the square whose tokens are every picture's budget; a multiple of 16."""
    max_sequence_length: int | None = None
    """Tokens that T5's embeddings are padded or cut to, 1 to 512; by default the model's own: 512
    for FLUX.1-dev, 256 for schnell."""
    overwrite: bool = False
    """Make features again that carry no metadata: the reference implementation's."""

    def __post_init__(self) -> None:
        """Refuse values out of range."""
        check_types(self)
        check_side("resolution", self.resolution)
        length = self.max_sequence_length
        if length is not None and not 1 <= length <= MAX_TEXT_TOKENS:
            raise ValueError(
                f"max_sequence_length {length} is outside 1 to {MAX_TEXT_TOKENS}, the range FLUX "
                f"was trained with; try {MAX_TEXT_TOKENS}"
            )


@dataclass
class Counts:
    """Feature files of one kind, by what this run did about them."""

    encoded: int = 0
    """Made by this run."""
    unchanged: int = 0
    """Up to date already."""
    kept: int = 0
    """Without metadata, so written by the reference; kept as they are."""
    shared: int = 0
    """Made by another process during this run."""


@dataclass
class CacheReport:
    """What a run of `cache` did, and what it left out."""

    latents: Counts = field(default_factory=Counts)
    embeds: Counts = field(default_factory=Counts)
    skipped: list[Skip] = field(default_factory=list)
    """Images and captions that were left out, each with its reason."""
    removed: list[str] = field(default_factory=list)
    """Out-of-date features of ours whose image or caption is no longer usable."""
    columns: dict[str, int] = field(default_factory=dict)
    """How many captions each column holds; all of them train."""
    cut: list[str] = field(default_factory=list)
    """Captions encoded now of which only the first tokens fit, with how many they have."""
    pictureless: list[str] = field(default_factory=list)
    """Names of features whose picture is gone: they stay, and train."""

    @property
    def num_ready(self) -> int:
        """Pictures that have latents."""
        counts = self.latents
        return counts.encoded + counts.unchanged + counts.kept + counts.shared


def cache(config: CacheConfig, *, progress: Progress | None = None) -> CacheReport:
    """Encode a folder's images and captions, as far as they are not encoded already.

    A file is made again only if what it was made from has changed. A run that was killed goes on
    where it stopped, and several processes share a folder. When this returns the folder is done,
    by whichever process. Text encoders and VAE are never in memory together, and are loaded only
    if there is work for them. While one picture is encoded a thread reads the next, no further: at
    4096 x 4096 that is 64 MiB more of the host's memory, and what decoding the file takes.

    Args:
        config: What to do.
        progress: Told of every step.

    Returns:
        What was done; also written to `.urae/cache_report.json` in the folder.

    Raises:
        ValueError: If the folder, its captions or the model cannot be used.
        FileNotFoundError, PermissionError: As `fetch_model`.
        OSError: If a file cannot be written; nothing is left half written.
    """
    sources, skips = find_sources(config.data_dir)
    model_path = fetch_model(config.model, without=["transformer"])
    encoders = Encoders(model_path)
    text_tokens = config.max_sequence_length or read_text_tokens(model_path)
    job = _Job(config, encoders, fingerprint_encoders(model_path), text_tokens)
    job.report.skipped += skips
    progress = progress or _no_progress

    captions, images = job.plan(sources, progress)
    job.remove_dropped(sources, [skip.file for skip in skips if skip.reason == NO_CAPTION])
    job.find_pictureless()
    work_dir = config.data_dir / WORK_DIR
    with Claims(work_dir / "lock") as claims:
        names = [source.embed_path(column).name for source, column in captions]
        for number in claims.share(names, lambda done: progress("captions", done, len(captions))):
            job.encode_caption(*captions[number])
        with claims.claim("empty prompt", wait=True):
            job.encode_empty_prompt()
        encoders.free_text_encoders()
        job.encode_images(images, claims, lambda done: progress("images", done, len(images)))
        with claims.claim(REPORT_NAME, wait=True):
            report = json.dumps(asdict(job.report), indent=2) + "\n"
            write_atomic(work_dir / REPORT_NAME, report.encode())
    return job.report


def _no_progress(stage: str, done: int, total: int) -> None:
    pass


@dataclass(frozen=True)
class _Picture:
    """An image that is ready to be encoded."""

    image: Image.Image
    """Of its bucket's size."""
    identity: dict[str, str]
    """What its latents are made from."""


class _Job:
    """One run: what makes a file up to date, what is due, and the report."""

    def __init__(
        self, config: CacheConfig, encoders: Encoders, prints: Fingerprints, text_tokens: int
    ) -> None:
        self.config = config
        self.encoders = encoders
        self.text_tokens = text_tokens
        self.report = CacheReport()
        self._changed: set[Path] = set()  # images that are not those their latents are made from
        # The content's hash is added file by file
        common = {FORMAT_KEY: FORMAT_VERSION, "dtype": name_dtype(encoders.dtype)}
        self.latent_identity = common | {
            "vae": prints.vae,
            "resolution": str(config.resolution),
        }
        self.embed_identity = common | {
            "text_encoders": prints.text_encoders,
            "max_sequence_length": str(text_tokens),
        }

    def plan(
        self, sources: list[Source], progress: Progress
    ) -> tuple[list[tuple[Source, str]], list[Source]]:
        """Find the captions and images that are due, and remove latents that no longer hold.

        Where no picture is left at all they stay: a resolution may have been mistyped.
        """
        captions, images, unfit = [], [], []
        for done, source in enumerate(sources):
            progress("inspect", done, len(sources))
            try:
                status = self._find_latent_status(source)
                if status is Status.DUE:
                    self._pick_bucket(source, *read_size(source.image))
                    images.append(source)
            except ImageError as error:
                unfit.append((source, error))
                continue
            _count(self.report.latents, status)
            for column in source.captions:
                self.report.columns[column] = self.report.columns.get(column, 0) + 1
                status = self._find_embed_status(source, column)
                _count(self.report.embeds, status)
                if status is Status.DUE:
                    captions.append((source, column))
        progress("inspect", len(sources), len(sources))
        for source, fault in unfit:
            self._skip(source, fault, keep=len(unfit) == len(sources))
        return captions, images

    def remove_dropped(self, sources: list[Source], uncaptioned: list[str]) -> None:
        """Remove our embeddings of captions that are gone, with the last also our latents.

        Args:
            sources: Images with captions.
            uncaptioned: Names of images that have none; what cannot be read is not among them.
        """
        columns: dict[str, dict[str, str]] = {source.stem: source.captions for source in sources}
        for name in uncaptioned:
            stem = Path(name).stem
            columns[stem] = {}
            self._remove_ours(latent_path(self.config.data_dir, stem))
        data_dir = self.config.data_dir
        known = columns.keys() | list_picture_stems(data_dir) | list_cached_stems(data_dir)
        for path in sorted(data_dir.glob(f"[!.]*{EMBED_SUFFIX}")):
            owner = find_owner(path, known)
            if owner and owner[0] in columns and owner[1] not in columns[owner[0]]:
                self._remove_ours(path)

    def find_pictureless(self) -> None:
        """Report features whose picture is gone; whoever wants its room may have removed it."""
        data_dir = self.config.data_dir
        self.report.pictureless = sorted(list_cached_stems(data_dir) - list_picture_stems(data_dir))

    def encode_caption(self, source: Source, column: str) -> None:
        """Write one caption's embeddings, unless another process just has."""
        owner = {"stem": source.stem, "column": column}
        if self._write_embeds(source.embed_path(column), source.captions[column], owner):
            self.report.embeds.encoded += 1
        else:
            self.report.embeds.shared += 1

    def encode_empty_prompt(self) -> None:
        """Write the empty prompt's embeddings, for caption dropout, unless they are up to date."""
        self._write_embeds(empty_prompt_path(self.config.data_dir), "", {})

    def encode_images(
        self, sources: list[Source], claims: Claims, advance: Callable[[int], None]
    ) -> None:
        """Write images' latents; a thread reads one image ahead, and does nothing else."""
        reading: dict[int, Future[_Picture | None]] = {}
        names = [source.latent_path.name for source in sources]
        with ThreadPoolExecutor(1, "urae-reader") as thread:

            def read_ahead(number: int) -> None:
                reading[number] = thread.submit(self._read_picture, sources[number])

            for number in claims.share(names, advance, ahead=read_ahead):
                source = sources[number]
                try:
                    picture = reading.pop(number).result()
                except ImageError as error:
                    self._skip(source, error)
                    continue
                if picture is None:
                    self.report.latents.shared += 1
                else:
                    self._write_latents(source, picture)

    def _read_picture(self, source: Source) -> _Picture | None:
        """Read, decode and fit an image, unless another process just has written its latents.

        It was due when it was inspected, so latents that are of this run now are another process's:
        the image is not read for that, or each process would read all of them.
        """
        if source.image not in self._changed:
            if find_status(source.latent_path, self.latent_identity) is Status.CURRENT:
                return None
        data = read_image(source.image)
        identity = self.latent_identity | {"image_sha256": digest(data)}
        if find_status(source.latent_path, identity) is Status.CURRENT:
            return None
        image = decode_image(data, source.image.name)
        bucket = self._pick_bucket(source, image.height, image.width)
        return _Picture(fit(image, bucket), identity)

    def _write_latents(self, source: Source, picture: _Picture) -> None:
        """Encode a picture into a file."""
        with explain_memory(f"encoding {source.image.name}", "a lower --resolution"):
            mean, std = self.encoders.encode_image(picture.image)
        facts = {
            "model": self.config.model,
            "height": str(picture.image.height),
            "width": str(picture.image.width),
        }
        write_features(source.latent_path, {"mean": mean, "std": std}, picture.identity | facts)
        self.report.latents.encoded += 1

    def _write_embeds(self, path: Path, caption: str, owner: dict[str, str]) -> bool:
        """Encode a caption into a file, and return whether it was due."""
        identity = self.embed_identity | {"caption_sha256": digest(caption)}
        if find_status(path, identity) is Status.CURRENT:
            return False
        with explain_memory("the text encoders", "closing other programs that use the GPU"):
            t5, clip = self.encoders.encode_caption(caption, self.text_tokens)
        if (num_tokens := self.encoders.count_tokens(caption)) > self.text_tokens:
            self.report.cut.append(f"{path.name}: {num_tokens} tokens")
        tensors = {"caption_feature_t5": t5, "caption_feature_clip": clip}
        write_features(path, tensors, identity | {"model": self.config.model} | owner)
        return True

    def _pick_bucket(self, source: Source, height: int, width: int) -> tuple[int, int]:
        bucket = pick_bucket(height, width, self.config.resolution)
        if not covers(height, width, bucket):
            raise ImageError(
                "too small",
                f"{source.image.name} is {width} x {height}; resolution {self.config.resolution} "
                f"needs {bucket[1]} x {bucket[0]} for its shape, and pictures are not enlarged",
            )
        return bucket

    def _find_latent_status(self, source: Source) -> Status:
        # The image is read and hashed only where all the rest agrees
        status = find_status(source.latent_path, self.latent_identity)
        if status is Status.CURRENT:
            image_sha256 = digest(read_image(source.image))
            status = find_status(source.latent_path, {"image_sha256": image_sha256})
            if status is Status.DUE:
                self._changed.add(source.image)
        return self._heed_overwrite(status)

    def _find_embed_status(self, source: Source, column: str) -> Status:
        identity = self.embed_identity | {"caption_sha256": digest(source.captions[column])}
        return self._heed_overwrite(find_status(source.embed_path(column), identity))

    def _heed_overwrite(self, status: Status) -> Status:
        return Status.DUE if self.config.overwrite and status is Status.FOREIGN else status

    def _skip(self, source: Source, error: ImageError, *, keep: bool = False) -> None:
        self.report.skipped.append(Skip(source.image.name, error.reason, str(error)))
        if not keep and error.reason != "unreachable image":  # the file may be as good as ever
            self._remove_ours(source.latent_path)

    def _remove_ours(self, path: Path) -> None:
        if path.exists() and find_status(path, {}) is not Status.FOREIGN:
            path.unlink(missing_ok=True)
            self.report.removed.append(path.name)


def _count(counts: Counts, status: Status) -> None:
    counts.unchanged += status is Status.CURRENT
    counts.kept += status is Status.FOREIGN
