"""Where client rounds run."""
