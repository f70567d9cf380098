#!/usr/bin/env python3
"""The programs as processes of mpirun: the bits of one process, one voice, and no way to end that leaves a process behind.

    LLAMA3_PROGRAMS=build LLAMA3_TEST_DATA=build/data python3 tests/test_mpi.py
"""

import json
import os
import select
import shutil
import signal
import subprocess
import tempfile
import time
import unittest
import uuid

from test_programs import DATA, DEMO, ERROR, PROGRAMS, output

MPIRUN = shutil.which("mpirun")
OPEN_MPI = MPIRUN is not None and b"Open MPI" in subprocess.run([MPIRUN, "--version"], capture_output=True).stdout
RANK_OF = "${OMPI_COMM_WORLD_RANK:-${PMI_RANK:-$PMIX_RANK}}"
PATIENCE = 60  # seconds until a hang is called one


class Job:
    """mpirun -n ranks program flags..., with the processes that belong to it."""

    def __init__(self, ranks, program, *flags, env=None):
        self.mark = f"LLAMA3_TEST_JOB={uuid.uuid4().hex}"
        oversubscribe = ["--oversubscribe", "--bind-to", "none"] if OPEN_MPI else []
        settings = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1", "OMP_WAIT_POLICY": "passive",
                    "OMPI_MCA_btl_vader_single_copy_mechanism": "none"}  # containers forbid the other one, which it then tells
        name, value = self.mark.split("=")
        if "/" not in program:
            program = os.path.join(PROGRAMS, program)
        self.process = subprocess.Popen([MPIRUN, *oversubscribe, "-n", str(ranks), program, *flags], stdin=subprocess.PIPE,
                                        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                                        env={**os.environ, **settings, **(env or {}), name: value})

    def members(self):
        """The ids of the ranks' processes that are there, by rank; None for mpirun itself."""
        found = {}
        for pid in filter(str.isdigit, os.listdir("/proc")):
            try:
                with open(f"/proc/{pid}/environ", "rb") as file:
                    variables = dict(part.partition("=")[::2] for part in file.read().decode(errors="replace").split("\0"))
                with open(f"/proc/{pid}/stat", encoding="utf-8") as file:
                    if file.read().rpartition(")")[2].split()[0] == "Z":
                        continue
            except OSError:
                continue
            if "LLAMA3_TEST_JOB=" + variables.get("LLAMA3_TEST_JOB", "") == self.mark:
                rank = variables.get("OMPI_COMM_WORLD_RANK", variables.get("PMI_RANK", variables.get("PMIX_RANK")))
                found[None if rank is None else int(rank)] = int(pid)
        return found

    def say(self, text):
        self.process.stdin.write(text)
        self.process.stdin.flush()

    def answer(self):
        """A line of its standard output."""
        line = b""
        while not line.endswith(b"\n"):
            if not select.select([self.process.stdout], [], [], PATIENCE)[0]:
                raise AssertionError(f"no answer, only {line!r}")
            some = os.read(self.process.stdout.fileno(), 1)
            if not some:
                raise AssertionError(f"ended after {line!r}: {self.process.stderr.read()!r}")
            line += some
        return line

    def end(self, input=b""):
        """Exit status, standard output, the lines on standard error that are the program's own; then nothing may be left."""
        try:
            out, errors = self.process.communicate(input, timeout=PATIENCE)
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError(f"it hung: {self.process.communicate()}") from None
        for _ in range(100):
            if not self.members():
                break
            time.sleep(0.1)
        left = self.members()
        self.kill()
        if left:
            raise AssertionError(f"processes were left behind: {left}")
        return self.process.returncode, out, [line + "\n" for line in errors.decode().split("\n") if ERROR.match(line + "\n")]

    def kill(self):
        for pid in self.members().values():
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                pass


def run(ranks, program, *flags, input=b"", env=None):
    return Job(ranks, program, *flags, env=env).end(input)


def good(ranks, program, *flags, input=b""):
    status, out, errors = run(ranks, program, *flags, input=input)
    if status != 0:
        raise AssertionError(f"{program} {flags} on {ranks}: {status} {errors}")
    return out


class SameBits(unittest.TestCase):
    def test_logits_and_tokens_are_those_of_one_process_in_every_format(self):
        models = [DEMO] + [os.path.join(DATA, f"segments8.{kind}.l3") for kind in ("f32", "bf16", "q8", "q4")]
        with tempfile.TemporaryDirectory() as folder:
            for model in models:
                seen = {}
                for ranks, threads in ((1, "2"), (2, "1"), (4, "1"), (2, "2")):
                    path = os.path.join(folder, "logits.npy")
                    flags = ("-m", model, "--tokens", ",".join(map(str, range(3, 40))), "-n", "6", "--temp", "0", "--ignore-eos",
                             "--ids", "-t", threads, "--logits", path)
                    ids = output("generate", *flags) if ranks == 1 else good(ranks, "generate", *flags)
                    with open(path, "rb") as file:
                        seen[ranks, threads] = ids, file.read()
                    os.remove(path)
                self.assertEqual(len(seen[1, "2"][0].split()), 6)
                for which in seen:
                    self.assertTrue(seen[which] == seen[1, "2"], f"{model} on {which}")

    def test_text_that_is_sampled_from_candidates_or_from_all_is_that_of_one_process(self):
        for flags in (("--temp", "0"), ("--temp", "1", "--top-k", "40"), ("--temp", "1"), ("--temp", "1", "--repeat-penalty", "1.3")):
            flags = ("-p", "Once upon a time", "-n", "30", "--ids", *flags)
            self.assertEqual(good(2, "generate", *flags), output("generate", *flags))

    def test_a_conversation_from_a_pipe_is_that_of_one_process(self):
        turns = b"Hello\nTell me a story about a fox.\nWho was it about?\n"
        for ranks in (2, 4):
            self.assertEqual(good(ranks, "chat", "-n", "30", input=turns), output("chat", "-n", "30", input=turns))

    def test_perplexity_is_that_of_one_process_and_may_be_compared_with_another_model(self):
        with tempfile.NamedTemporaryFile() as file:
            file.write(b"Once upon a time there was a fox. " * 20)
            file.flush()
            for flags in (("-f", file.name, "-c", "32", "--json"), ("-f", file.name, "-c", "32", "--json", "--kl-base", DEMO)):
                self.assertEqual(good(2, "perplexity", *flags), output("perplexity", *flags))

    def test_bench_says_what_carries_the_data_and_how_long_it_takes(self):
        found = json.loads(good(2, "bench", "-p", "8", "-n", "4", "-r", "1", "--batch", "1,3", "-t", "1", "--json"))
        self.assertEqual([(r["ranks"], r["threads"], r["batch"]) for r in found["results"]], [(2, 1, 1), (2, 1, 3)])
        for result in found["results"]:
            self.assertIn("2 processes, MPI", result["transport"])
            self.assertTrue(0 < result["communicate_share"] < 1)


class OneVoice(unittest.TestCase):
    def test_programs_without_ranks_run_once(self):
        for program, *flags in (("tokenize",), ("chat", "--help")):
            self.assertEqual(good(2, program, *flags, input=b"Hello"), output(program, *flags, input=b"Hello"))
        self.assertEqual(good(2, "inspect", DEMO).count(b"Configuration"), 1)

    def test_a_wrong_command_line_is_said_once(self):
        status, out, errors = run(2, "generate", "-p", "a", "--no-such-flag")
        self.assertEqual((status, out, len(errors)), (2, b"", 1))

    def test_numbers_of_ranks_that_cannot_work_are_refused_once(self):
        status, out, errors = run(3, "generate", "-p", "a")
        self.assertEqual((status, out, len(errors)), (1, b"", 1), errors)
        self.assertIn("found 3, expected 1, 2, 4, 8", errors[0])
        status, out, errors = run(2, "generate", "-p", "a", "--ranks", "4")
        self.assertEqual((status, out, len(errors)), (1, b"", 1), errors)
        self.assertIn("1 or 2", errors[0])
        self.assertEqual(good(2, "generate", "-p", "a", "-n", "3", "--ranks", "2"), output("generate", "-p", "a", "-n", "3"))

    @unittest.skipUnless(OPEN_MPI, "how others load MPI is not known")
    def test_a_process_that_is_alone_does_not_start_mpi(self):
        def libraries(job, pid):
            job.say(b"Hello\n")
            job.answer()
            with open(f"/proc/{pid(job)}/maps", encoding="utf-8") as file:
                return file.read()

        alone = subprocess.Popen([os.path.join(PROGRAMS, "chat"), "-n", "3"], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        alone.stdin.write(b"Hello\n")
        alone.stdin.flush()
        alone.stdout.readline()
        with open(f"/proc/{alone.pid}/maps", encoding="utf-8") as file:
            self.assertNotIn("mca_", file.read())  # a part of Open MPI that it loads when it starts
        alone.communicate()
        for ranks in (1, 2):
            job = Job(ranks, "chat", "-n", "3")
            loaded = libraries(job, lambda job: job.members()[0])
            self.assertEqual("mca_" in loaded, ranks > 1)
            self.assertEqual(job.end()[0], 0)


class Endings(unittest.TestCase):
    def talking(self, ranks, **env):
        job = Job(ranks, "chat", "-n", "5", env=env)
        self.addCleanup(job.kill)
        job.say(b"Hello\n")
        job.answer()
        self.assertEqual(sorted(rank for rank in job.members() if rank is not None), list(range(ranks)))
        return job

    def test_end_of_input_ends_all(self):
        for ranks in (2, 4):
            self.assertEqual(self.talking(ranks).end(), (0, b"", []))

    def test_an_error_of_rank_0_is_one_line_and_ends_all(self):
        for ranks in (2, 4):
            status, out, errors = run(ranks, "generate", "--tokens", "5,6,7,8", "-c", "3")
            self.assertEqual((status, out, len(errors)), (1, b"", 1), errors)
            self.assertIn("context", errors[0])

    def test_a_missing_file_is_said_once_also_where_it_is_missing_on_one_rank(self):
        status, _, errors = run(4, "generate", "-p", "a", "-m", "no/such.l3")
        self.assertEqual((status, len(errors)), (1, 1), errors)
        status, _, errors = self.with_models({0: DEMO, 1: "no/such.l3"})
        self.assertEqual((status, len(errors)), (1, 1), errors)
        self.assertTrue(errors[0].startswith("rank 1, no/such.l3: "), errors)

    def test_a_rank_with_another_file_is_named(self):
        one, other = (os.path.join(DATA, f"segments8.{kind}.l3") for kind in ("q8", "q4"))
        for models in ({0: one, 1: other}, {0: one, 1: one, 2: other, 3: one}):
            status, out, errors = self.with_models(models)
            self.assertEqual((status, out, len(errors)), (1, b"", 1), errors)
            self.assertIn(f"rank 0 and rank {len(models) // 2}", errors[0])

    def with_models(self, models):
        with tempfile.TemporaryDirectory() as folder:
            script = os.path.join(folder, "program.sh")
            with open(script, "w", encoding="utf-8") as file:
                cases = "".join(f"{rank}) m={model};; " for rank, model in models.items())
                file.write(f'#!/bin/sh\ncase {RANK_OF} in {cases}esac\nexec {PROGRAMS}/generate --tokens 1,2 -n 1 -m "$m"\n')
            os.chmod(script, 0o755)
            return run(len(models), script)

    def test_a_killed_rank_ends_all(self):
        for ranks, killed in ((2, 1), (2, 0), (4, 2)):
            job = self.talking(ranks)
            os.kill(job.members()[killed], signal.SIGKILL)
            status, _, errors = job.end()
            self.assertNotEqual(status, 0)
            self.assertLessEqual(len(errors), 1, errors)

    def test_ctrl_c_ends_all(self):
        job = self.talking(2)
        job.process.send_signal(signal.SIGINT)
        job.process.wait(PATIENCE)  # before the end of input, which would end it too
        status = job.end()[0]
        if OPEN_MPI:  # MPICH's mpirun returns 2 or 0, as it happens
            self.assertNotEqual(status, 0)

    def test_a_rank_that_stands_still_is_waited_for_as_long_as_is_allowed(self):
        for ranks, stopped in ((2, 1), (4, 3)):
            job = self.talking(ranks, LLAMA3_RANK_TIMEOUT="3")
            os.kill(job.members()[stopped], signal.SIGSTOP)
            start = time.time()
            status, _, errors = job.end(b"Tell me more.\n")
            self.assertGreater(time.time() - start, 3)
            self.assertEqual((status, len(errors)), (1, 1), errors)
            self.assertIn("nothing for 3 seconds", errors[0])

    def test_after_a_time_out_nothing_is_begun_any_more(self):
        status, out, errors = run(2, "late_rank")
        self.assertEqual((status, errors), (1, []), errors)
        first, *others = out.decode().splitlines()
        self.assertIn("rank 0, a sum: the other ranks do not answer (found nothing for 1 seconds", first)
        self.assertEqual(len(others), 4)
        for line in others:
            self.assertTrue(line.startswith("rank 0: the ranks have lost step (found an earlier failure"), line)

    def test_the_end_is_not_waited_for_longer_than_is_allowed(self):
        job = self.talking(2, LLAMA3_RANK_TIMEOUT="2")
        time.sleep(1)  # the answer is complete
        os.kill(job.members()[1], signal.SIGSTOP)
        job.end()  # and would raise for a job that hangs or leaves a process behind

    def test_a_rank_that_waits_for_the_next_turn_is_not_timed_out(self):
        job = self.talking(2, LLAMA3_RANK_TIMEOUT="2")
        time.sleep(3)
        job.say(b"Hello again\n")
        self.assertTrue(job.answer())
        self.assertEqual(job.end()[0], 0)

    def test_a_time_that_is_none_is_refused(self):
        status, _, errors = run(2, "generate", "-p", "a", env={"LLAMA3_RANK_TIMEOUT": "soon"})
        self.assertEqual((status, len(errors)), (1, 1), errors)
        self.assertIn("LLAMA3_RANK_TIMEOUT", errors[0])


if __name__ == "__main__":
    if MPIRUN is None:
        print("mpirun did not run: it is not installed")
    else:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        unittest.main(verbosity=2)
