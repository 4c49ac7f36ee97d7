"""The command line: mistakes are one message, exit code 2, and nothing written."""

import json

from project import ROOT, python

DIGITS = f"--config={ROOT / 'configs' / 'digits.py'}"

# What is wrong with the command line, and a part of the message.
MISTAKES = [
    ([], "--config is missing. Known: "),
    (["--config.batch_size=3"], "--config is missing. Known: "),
    (["--config", "--workdir=x"], "--config: expected a file. Known: "),
    (["--config", "configs/nothing.py"], "there is no file configs/nothing.py. Known: "),
    (["configs/digits.py"], "'configs/digits.py'; write --config=configs/digits.py"),
    (["config=x.py"], "'config=x.py'; write --config=x.py"),
    ([DIGITS, "digits"], "unexpected argument 'digits'; write --name=value"),
    ([DIGITS, "--workdri=x"], "unknown flag --workdri. Did you mean --workdir?"),
    ([DIGITS, "--learning_rate=3"], "Did you mean --config.optim.learning_rate?"),
    ([DIGITS, "--config.batchsize=64"], "unknown key 'batchsize'. Did you mean batch_size? Known"),
    ([DIGITS, "--config.optim.lr=1"], "unknown key 'optim.lr'. Known there: optim.decay_start"),
    (
        [DIGITS, "--config.lr=1"],
        "steps, task. --help lists the keys that matter, with their groups",
    ),
    ([DIGITS, "--config.momentum=1"], "Did you mean optim.momentum?"),
    ([DIGITS, "--config.optim=1"], "'optim' is a group. Set one of its keys: optim.decay_start"),
    (
        [DIGITS, "--config.data.grey=0.2"],
        "'data.grey' is now called 'data.grayscale'. Write --config.data.grayscale=0.2",
    ),
    (
        [DIGITS, "--config.eval.beside=('a',)"],
        "'eval.beside' is now called 'eval.compare'. Write --config.eval.compare=\"('a',)\"",
    ),
    (
        [DIGITS, "--config.data.grey", "0.2"],
        "'data.grey' is now called 'data.grayscale'. Write --config.data.grayscale=0.2",
    ),
    ([DIGITS, "--config.model.options.depth=3"], "Set it in a config file of your own"),
    ([DIGITS, "--config.batch_size=many"], "batch_size: expected a whole number; got 'many'"),
    ([DIGITS, "--config.batch_size", "many"], "batch_size: expected a whole number; got 'many'"),
    ([DIGITS, "--config.batch_size=64", "--config.batch_size=many"], "a whole number; got 'many'"),
    ([DIGITS, "--config.batch_size=many", "--config.batch_size=64"], "a whole number; got 'many'"),
    ([DIGITS, "--config.epochs"], "Missing value for flag --config.epochs"),
    ([DIGITS, "--config.batch_size=None"], "batch_size: expected a whole number; got 'None'"),
    # the last value is the one that counts, and None leaves a key open
    ([DIGITS, "--config.batch_size=5", "--config.batch_size=7000"], "batch_size=7000 is larger"),
    (
        [DIGITS, "--config.assign.block=None", "--config.assign.block=100"],
        "assign.block: expected a positive divisor of batch_size = 128; got 100",
    ),
    (
        [DIGITS, "--config.assign.block=100", "--config.assign.block=None", "--config.steps=-1"],
        "epochs and steps: expected 0 or more; got 50.0, -1",
    ),
    ([DIGITS, "--config.epochs=1,5"], "epochs: expected a number; got '1,5'"),
    ([DIGITS, "--config.data.flip=maybe"], "data.flip: expected True or False; got 'maybe'"),
    ([DIGITS, "--config.seeds=x"], "seeds: expected whole numbers, for instance --config.seeds="),
    ([DIGITS, "--config.task=knm"], "task: unknown 'knm'. Known: pretrain"),
    ([DIGITS, "--config.data.source=imagnet"], "unknown source 'imagnet'; known: digits"),
    ([DIGITS, "--workdir=/dev/null/run"], "cannot use /dev/null/run"),
]
DEFAULTS = "from nat_jax import config\ndef get_config():\n    c = config.default()\n"
# Config files with a mistake, a part of the message, and more arguments.
WRONG_FILES = [
    ("def get_config(:", "wrong.py, line 1: invalid syntax"),
    ("import nothing_at_all", "wrong.py, line 1: ModuleNotFoundError: No module named"),
    ("", "the file has no function get_config()"),
    ("def get_config():\n    return None", "must return a ConfigDict; it returned a NoneType"),
    (
        "def get_config():\n    return 1 / 0",
        "wrong.py, line 2: ZeroDivisionError: division by zero",
    ),
    (
        DEFAULTS + "    c.batchsize = 3\n    return c",
        "wrong.py, line 4: unknown key 'batchsize'. Did you mean batch_size?",
    ),
    (DEFAULTS + "    c.epochs = 'x'\n    return c", "wrong.py, line 4: TypeError: "),
    (DEFAULTS + "    c.data.grey = 'x'\n    return c", "wrong.py, line 4: TypeError: "),
    (
        DEFAULTS + "    c.epochs = None\n    return c",
        "epochs: expected a value such as 0.0; got None",
    ),
    (
        DEFAULTS + "    c.epochs, c.assign.options.max_rounds = 1.0, None\n    return c",
        "assign.options: max_rounds must be in [0, 2147483647], got -1",
        "--config.assign.options.max_rounds=-1",
    ),
    (
        DEFAULTS + "    c.epochs, c.assign.options.max_rounds = 1.0, -1\n    return c",
        "unknown source 'imagnet'",
        "--config.assign.options.max_rounds=None",
        "--config.data.source=imagnet",
    ),
]
# Gives each command line of a list to the program, and prints exit codes and what was printed.
# jax is imported once for all: the copies that fork makes of this process start in no time.
FORKED = """
import json, os, sys, traceback
from nat_jax import main, train
outcomes = []
for arguments in json.loads(sys.argv[1]):
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        os.dup2(writing, 1), os.dup2(writing, 2)
        sys.argv = ["main", *arguments]
        try:
            main.run()
        except SystemExit as error:
            os._exit(error.code)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        finally:
            os._exit(99)
    os.close(writing)
    with os.fdopen(reading) as file:
        text = file.read()
    outcomes.append([os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), text])
print(json.dumps(outcomes))
"""


def outcomes(folder, command_lines):
    lines = json.dumps(command_lines)
    return json.loads(python("-W", "ignore", "-c", FORKED, lines, cwd=folder).stdout)


def test_a_mistake_is_one_message_and_any_other_error_a_traceback(tmp_path):
    lines = [list(arguments) for arguments, _ in MISTAKES]
    files = [(text, *arguments) for text, _, *arguments in WRONG_FILES]
    files.append(("import json\n\ndef get_config():\n    return json.loads('')",))
    broken = "import nat_jax.train\nnat_jax.train.open_sources = lambda config: int('x')"
    files.append((f"{DEFAULTS}    c.epochs = 1.0\n    return c\n{broken}",))
    for number, (text, *arguments) in enumerate(files):
        (tmp_path / str(number)).mkdir()
        (tmp_path / str(number) / "wrong.py").write_text(text + "\n")
        lines.append([f"--config={number}/wrong.py", *arguments])
    before = set(tmp_path.iterdir())
    *found, in_json, in_library = outcomes(tmp_path, lines)
    expected = [message for _, message, *_ in (*MISTAKES, *WRONG_FILES)]
    for line, message, (code, text) in zip(lines[:-2], expected, found, strict=True):
        assert code == 2, (line, text)
        assert message in text, (line, text)
        assert text.splitlines()[-1].startswith("nat_jax: "), (line, text)
        assert "Traceback" not in text, (line, text)
    for (code, text), name in ((in_json, "JSONDecodeError"), (in_library, "ValueError")):
        assert code == 1 and "Traceback" in text and name in text, text
    assert set(tmp_path.iterdir()) == before


def test_the_package_is_a_program_too(tmp_path):
    done = python("-m", "nat_jax", "--help", cwd=tmp_path)
    assert done.stdout.startswith("usage: python -m nat_jax.main"), done.stderr
