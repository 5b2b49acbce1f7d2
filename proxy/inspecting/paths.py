"""Each view's path below /api: where a running proxy is asked for it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from proxy.inspecting import rewrite_views, views
from proxy.inspecting.views import Asked, Desk

View = Callable[[Desk, Asked], Awaitable[Any]]
CHAT = "/conversations/{conversation}"

VIEWS: dict[str, tuple[str, View]] = {
    "conversations": ("/conversations", views.conversations),
    "search": ("/search", views.search),
    "conversation": (CHAT, views.conversation),
    "message": (f"{CHAT}/messages/{{message}}", views.one_message),
    "timeline": (f"{CHAT}/timeline", views.timeline),
    "summaries": (f"{CHAT}/summaries", views.summaries),
    "summary": (f"{CHAT}/summaries/{{summary}}", views.one_summary),
    "branches": (f"{CHAT}/branches", views.branches),
    "figures": (f"{CHAT}/figures", views.figures),
    "context": (f"{CHAT}/context", views.context),
    "seen": (f"{CHAT}/seen/{{turn}}", views.seen),
    "export": (f"{CHAT}/export", views.export),
    "rewrites": (f"{CHAT}/rewrites", rewrite_views.rewrites),
    "rewrite": (f"{CHAT}/rewrites/{{rewrite}}", rewrite_views.rewrite),
}
"""Each view's path below /api, and what makes it."""
