"""What a task goes through, as pure decisions: its states, when it may run again, and what a restart does with it.

Nothing here reads a clock, a socket or the store: the shells (dispatch, recovery at start) pass values in and carry
the returned instructions out.
"""
