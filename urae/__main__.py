"""Run the command line as a module: `accelerate launch -m urae train ...`."""

from urae.cli.main import main

main()
