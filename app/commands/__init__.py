"""The subcommands of `lorgnette`, a module each."""
