"""Five programs around vae_ppo.py; README.md says what each one is for."""

import argparse
import inspect
import sys

import gymnasium as gym

from vae_ppo import UserError


def main(doc, *commands):
    """Run the command that the command line names, or the only one. Its parameters are those of the
    function: a `list` takes several words, what has a default is an option, False a switch. What
    the user can mend ends it with one sentence and exit code 2."""
    parser = argparse.ArgumentParser(description=doc)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    subparsers = parser.add_subparsers(required=True)
    for command in commands:
        own = subparsers.add_parser(command.__name__, description=command.__doc__)
        own.set_defaults(command=command)
        for name, parameter in inspect.signature(command).parameters.items():
            default, option = parameter.default, "--" + name.replace("_", "-")
            if default is parameter.empty:
                own.add_argument(name, nargs="+" if parameter.annotation is list else None)
            elif parameter.annotation is list:
                own.add_argument(name, nargs="*", default=default)
            elif default is False:
                own.add_argument(option, action="store_true")
            elif isinstance(default, tuple):
                own.add_argument(option, nargs="+", default=default, type=type(default[0]))
            else:
                own.add_argument(option, default=default, type=type(default))
    only = [commands[0].__name__] if len(commands) == 1 else []
    inputs = vars(parser.parse_args(only + sys.argv[1:]))
    for name, value in inputs.items():
        if type(value) is int and (value < 0 or value == 0 and name != "seed"):
            parser.error(f"--{name} {value} is too small")
    try:
        sys.exit(inputs.pop("command")(**inputs))
    except (UserError, gym.error.Error, OSError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
