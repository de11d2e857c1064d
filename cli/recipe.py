"""segfleet recipe [NAME] [key=value ...]"""

from __future__ import annotations

from typing import Annotated

import typer

from segfleet.cli.options import Changes, Json
from segfleet.cli.output import show, table


def command(
    name: Annotated[
        str | None,
        typer.Argument(
            help="A recipe file or the name of a shipped recipe; none: list the shipped ones."
        ),
    ] = None,
    changes: Changes = None,
    schema: Annotated[
        bool,
        typer.Option("--schema", help="Print the JSON schema of all recipes, a line on every key."),
    ] = False,
    as_json: Json = False,
) -> None:
    """List the shipped recipes, or validate one and print it with all defaults filled in."""
    from segfleet.pipeline import recipe as recipes

    if schema:
        show(recipes.Recipe.model_json_schema(), True, lambda _: None)
    elif name is None:
        rows = [
            {"name": recipe_name, "about": about(recipes.RECIPES / f"{recipe_name}.yaml")}
            for recipe_name in recipes.recipe_names()
        ]
        show(
            rows,
            as_json,
            lambda rows: table(("name", "about"), [(row["name"], row["about"]) for row in rows]),
        )
    else:
        from segfleet.core.settings import dumps

        document = recipes.load_recipe(name, changes).model_dump(mode="json")
        show(
            document,
            as_json,
            lambda document: typer.echo(dumps(document).rstrip()),
        )


def about(path) -> str:
    """The first comment line of a recipe file."""
    return path.read_text(encoding="utf-8").splitlines()[0].lstrip("# ")
