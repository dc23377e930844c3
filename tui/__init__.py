"""The face: command line, chat screens, conversation store."""
