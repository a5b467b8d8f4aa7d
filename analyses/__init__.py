"""Questions asked of models and dictionaries, and the reports that answer them."""
