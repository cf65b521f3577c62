import typer

from sandbox.command import sandbox

typer.run(sandbox)
