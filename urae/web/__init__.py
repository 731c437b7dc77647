"""A page in the browser that generates pictures on this machine."""

from urae.web.config import WebConfig
from urae.web.page import serve

__all__ = ["WebConfig", "serve"]
