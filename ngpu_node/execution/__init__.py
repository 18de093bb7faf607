"""One attempt at a task: admitted or refused, passed through, metered, receipted."""
