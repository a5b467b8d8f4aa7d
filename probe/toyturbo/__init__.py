"""toy-turbo: a small model of SDXL-Turbo's architecture, and the world of scenes it draws."""
