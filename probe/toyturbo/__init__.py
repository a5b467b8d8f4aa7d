"""toy-turbo: a small model of SDXL-Turbo's architecture, and the world of scenes it draws."""

from probe.pipelines import import_diffusers

# Its modules take diffusers' classes by name, and this first import of the library is a quiet one.
import_diffusers()
