"""Conversation memory: chains, summaries, contexts. Knows no HTTP and no model."""
