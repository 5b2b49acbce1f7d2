"""Policies tried on real chats: simulation, measures, the search for the best, and the report."""
