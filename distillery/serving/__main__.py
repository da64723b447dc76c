"""`python -m distillery.serving FOLDER --name NAME` serves a model folder."""

from distillery.serving.server import main

main()
