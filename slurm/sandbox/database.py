"""The accounting of a sandbox: slurmdbd and a private MariaDB, both in the sandbox's folder and on
loopback ports of their own.

Nothing on disk is made safe against a power cut, which makes it start within seconds. Debian's
packages: slurmdbd and mariadb-server.
"""

from __future__ import annotations

import secrets
import shutil
import subprocess
import time
from pathlib import Path

PROGRAMS = ("slurmdbd", "mariadbd", "mariadb-install-db", "mariadb", "sacct", "sacctmgr")
PACKAGES = "slurmdbd mariadb-server"

SERVER = """\
[mariadbd]
datadir={db}/data
socket={db}/sock
pid-file={db}/pid
log-error={folder}/log/mariadbd.log
bind-address=127.0.0.1
port={port}
user=root
innodb_buffer_pool_size=64M
innodb_log_file_size=16M
innodb_lock_wait_timeout=900
innodb_flush_method=nosync
innodb_flush_log_at_trx_commit=0
innodb_doublewrite=0
performance_schema=0
skip-name-resolve
"""

SLURMDBD = """\
AuthType=auth/munge
AuthInfo=socket={folder}/munge/sock
DbdHost=localhost
DbdAddr=127.0.0.1
DbdPort={dbd_port}
SlurmUser=root
PidFile={folder}/dbd.pid
LogFile={folder}/log/slurmdbd.log
StorageType=accounting_storage/mysql
StorageHost=127.0.0.1
StoragePort={port}
StorageUser=slurm
StoragePass={password}
StorageLoc=slurm_acct_db
"""

# With a private munge socket the last but one is required; else every client of slurmdbd falls back
# to the machine's own.
CONTROLLER = """\
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=127.0.0.1
AccountingStoragePort={dbd_port}
AccountingStoragePass={folder}/munge/sock
AccountingStorageTRES=gres/gpu"""

# Root comes in through the socket only, and only if it is root: a port without a password would be
# open to everybody on the machine.
INSTALL = (
    "--auth-root-authentication-method=socket",
    "--auth-root-socket-user=root",
    "--user=root",
    "--skip-test-db",
    "--skip-name-resolve",
)


class Database:
    """A MariaDB in `folder`/db on `port`; slurmdbd, which the sandbox starts, listens on
    `dbd_port`."""

    def __init__(self, folder: Path, port: int, dbd_port: int):
        self.folder, self.home = folder, folder / "db"
        self.port, self.dbd_port = port, dbd_port

    @property
    def controller(self) -> str:
        """Its lines of slurm.conf."""
        return CONTROLLER.format(folder=self.folder, dbd_port=self.dbd_port)

    def start(self, search: str) -> None:
        """Back when the server answers and slurmdbd.conf lies beside slurm.conf. `search`: PATH.
        Raises RuntimeError."""
        self.home.mkdir(mode=0o700, exist_ok=True)
        program = {name: shutil.which(name, path=search) for name in PROGRAMS}
        if not (self.home / "data" / "mysql").is_dir():
            where = f"--datadir={self.home}/data"
            _run(
                program["mariadb-install-db"],
                "--no-defaults",
                where,
                *INSTALL,
                "--innodb-flush-method=nosync",
            )
        options = self.home / "my.cnf"
        options.write_text(SERVER.format(db=self.home, folder=self.folder, port=self.port))
        silent = 'exec 2>>"$1" >&2; shift; "$@" &'  # it does not go to the background by itself
        log = self.folder / "log" / "mariadbd.log"
        _run(
            "sh",
            "-c",
            silent,
            "sh",
            str(log),
            program["mariadbd"],
            f"--defaults-file={options}",
            start_new_session=True,
        )
        password = secrets.token_hex(16)
        statements = (
            "CREATE DATABASE IF NOT EXISTS slurm_acct_db",
            f"CREATE OR REPLACE USER 'slurm'@'127.0.0.1' IDENTIFIED BY '{password}'",
            "GRANT ALL ON slurm_acct_db.* TO 'slurm'@'127.0.0.1'",
        )
        self._await(program["mariadb"])
        _run(program["mariadb"], *self._client, input=";\n".join(statements))
        path = self.folder / "etc" / "slurmdbd.conf"
        path.touch(mode=0o600)
        path.write_text(
            SLURMDBD.format(
                folder=self.folder, dbd_port=self.dbd_port, port=self.port, password=password
            )
        )

    @property
    def _client(self) -> tuple[str, ...]:
        return "--no-defaults", f"--socket={self.home}/sock", "--user=root"

    def _await(self, client: str, patience: float = 30) -> None:
        deadline = time.monotonic() + patience
        while subprocess.run(
            [client, *self._client, "-e", "SELECT 1"], capture_output=True, timeout=30
        ).returncode:
            if time.monotonic() > deadline:
                raise RuntimeError(
                    f"slurm-sandbox: mariadbd does not answer after {patience:.0f} s; log in "
                    f"{self.folder}/log/mariadbd.log"
                )
            time.sleep(0.1)


def _run(*command: str, **options) -> None:
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, **options)
    if done.returncode:
        raise RuntimeError(
            f"slurm-sandbox: {command[0]} failed: {(done.stderr or done.stdout).strip()}"
        )
