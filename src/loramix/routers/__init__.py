"""What makes scalings: routers, which make logits, and gatings, which make scalings of them.

To add a kind of router or a gating, see docs/architecture.md, "To add one, write this file".
"""

from __future__ import annotations

from loramix._registry import import_modules
from loramix.routers.arrow import ArrowRouter
from loramix.routers.classifier import XLoraClassifier
from loramix.routers.evidence import EvidenceRouter
from loramix.routers.gating import Gating, gating_of, register_gating
from loramix.routers.linear import LinearRouter
from loramix.routers.norm import NormRouter
from loramix.routers.router import (
    ConstantRouter,
    HiddenStateRouter,
    LayerRouter,
    Router,
    RouterSizes,
    TextRouter,
    register_router,
    router_class,
    router_kinds,
)
from loramix.routers.static import StaticRouter

import_modules(__name__, __path__)

__all__ = [
    "ArrowRouter",
    "ConstantRouter",
    "EvidenceRouter",
    "Gating",
    "HiddenStateRouter",
    "LayerRouter",
    "LinearRouter",
    "NormRouter",
    "Router",
    "RouterSizes",
    "StaticRouter",
    "TextRouter",
    "XLoraClassifier",
    "gating_of",
    "register_gating",
    "register_router",
    "router_class",
    "router_kinds",
]
