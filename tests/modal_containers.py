"""The containers of modal_servicer.py: what is laid out for them, how they run and end, and what of a volume they see."""
import asyncio
import contextlib
import copy
import os
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

from grpclib.server import Server
from modal._serialization import deserialize_data_format
from modal_proto import api_pb2


@dataclass
class Call:
    """One `.remote`, `.spawn` or map: its inputs and the outputs so far, in order of arrival."""

    function_id: str
    request: api_pb2.FunctionMapRequest
    inputs: dict = field(default_factory=dict)   # input id -> (idx, FunctionInput)
    outputs: list = field(default_factory=list)
    arrived: asyncio.Condition = field(default_factory=asyncio.Condition)


@dataclass
class Container:
    """One process and the input it was started for. retries: how often its caller asked again after an error; kills: how many had the same
    input and were killed."""

    function: str
    arguments: tuple
    root: Path
    call: Call
    input_id: str
    retries: int
    kills: int = 0
    process: subprocess.Popen | None = None
    seen: dict = field(default_factory=dict)     # volume id -> {path: stat} as of the last look at what is committed
    volumes: dict = field(default_factory=dict)  # volume id -> folder
    environment: dict = field(default_factory=dict)
    given: bool = False
    answered: bool = False

    def kill(self):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)


def stats_of(folder):
    return {str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.stat().st_size) for path in folder.rglob("*") if path.is_file()}


def copy_changed(source, target, names):
    for name in names:
        part = target / (name + ".copy")
        part.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(source / name, part)
        os.replace(part, target / name)


def environment_of(commands):
    """The variables that a Dockerfile's ENV lines set."""
    found = [re.match(r'ENV (\w+)=(.*)', command) for command in commands]
    return {match[1]: match[2].strip("'\"") for match in found if match}


class Containers:
    """The part of the servicer that runs inputs; it has root, edits, kill_when, containers, created, apps, files and logs."""

    def start(self, call, input_id, retries=0, kills=0):
        function, item = self.created[call.function_id], call.inputs[input_id][1]
        positional, named = deserialize_data_format(item.args, item.data_format, None)
        root = self.root / f"container-{len(self.containers)}"
        container = Container(function.function_name, (*positional, *named.values()), root, call, input_id, retries, kills)
        self.containers.append(container)
        task = asyncio.get_running_loop().create_task(self.live(container, function))
        self.tasks.add(task)

    async def live(self, container, function):
        """One container from start to end; a container that is killed has its input given to another one."""
        app_id = next(app_id for app_id, app in self.apps.items() if function.function_name in app.function_ids)
        view = copy.copy(self)
        view.container = container
        socket, server = container.root / "socket", Server([view])
        container.environment = self.lay_out(container, function, app_id)
        await server.start(path=str(socket))
        container.process = subprocess.Popen(
            [sys.executable, "-m", "modal._container_entrypoint"], cwd=container.root / "root", start_new_session=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=container.environment | {"MODAL_SERVER_URL": f"unix://{socket}"})
        watch = asyncio.create_task(self.watch(container, function))
        await asyncio.to_thread(self.pass_on, container, self.logs[app_id], asyncio.get_running_loop())
        watch.cancel()
        server.close()
        if container.process.returncode < 0 and not container.answered and self.apps:
            self.start(container.call, container.input_id, container.retries, container.kills + 1)

    async def watch(self, container, function):
        while not (self.kill_when and self.kill_when(container)):
            await asyncio.sleep(0.02)
        for mount in function.volume_mounts:
            assert mount.allow_background_commits
            self.commit(container, mount.volume_id)
        container.kill()

    def pass_on(self, container, log, loop):
        for line in container.process.stdout:
            loop.call_soon_threadsafe(log.put_nowait, line.decode("utf-8", "replace"))
        container.process.wait()

    def lay_out(self, container, function, app_id):
        """The container's files; returns its environment, which has nothing of this process but the way to Python."""
        root, image = container.root, self.created[function.image_id]
        inside = lambda text: re.sub(r"/vol/", f"{root}/vol/", text)
        (root / "root").mkdir(parents=True)
        for name, sha in [(file.filename, file.sha256_hex) for mount_id in function.mount_ids for file in self.created[mount_id].files]:
            target = root / name.lstrip("/")
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(self.files[sha])
        entry = root / "root" / "modal_app.py"
        text = inside(entry.read_text(encoding="utf-8"))
        for old, new in self.edits.items():
            assert old in text, old
            text = text.replace(old, new)
        entry.write_text(text, encoding="utf-8")
        for mount in function.volume_mounts:
            container.volumes[mount.volume_id] = root / mount.mount_path.lstrip("/")
            container.volumes[mount.volume_id].mkdir(parents=True)
            self.look(container, mount.volume_id)
        self.write_arguments(container, function, app_id)
        secrets = [item for secret_id in function.secret_ids for item in self.created[secret_id].items()]
        return {"PATH": os.environ["PATH"], "HOME": str(root), "PYTHONPATH": str(root / "root"), "OMP_NUM_THREADS": "1", "MODAL_IS_REMOTE": "1",
                "MODAL_TASK_ID": root.name, "MODAL_CONTAINER_ARGUMENTS_PATH": str(root / "arguments"),
                **{name: inside(value) for name, value in self.environment(image).items()}, **dict(secrets)}

    def environment(self, image):
        below = [self.environment(self.created[base.image_id]) for base in image.base_images]
        return {name: value for part in (*below, environment_of(image.dockerfile_commands)) for name, value in part.items()}

    def write_arguments(self, container, function, app_id):
        function_ids = self.apps[app_id].function_ids
        objects = [api_pb2.Object(object_id=function_id, function_handle_metadata=self.handle(function_id)) for function_id in function_ids.values()]
        objects += [api_pb2.Object(object_id=dependency.object_id) for dependency in function.object_dependencies]
        layout = api_pb2.AppLayout(objects=objects, function_ids=function_ids)
        arguments = api_pb2.ContainerArguments(task_id=container.root.name, function_id=function_ids[function.function_name], app_id=app_id,
                                               function_def=function, app_layout=layout)
        (container.root / "arguments").write_bytes(arguments.SerializeToString())

    def commit(self, container, volume_id):
        """Make what a container changed the committed state; of a file that two changed, the last one counts."""
        source, target, seen = container.volumes[volume_id], self.committed(volume_id), container.seen[volume_id]
        now = stats_of(source)
        copy_changed(source, target, [name for name, stat in now.items() if seen.get(name) != stat])
        for name in seen.keys() - now.keys():
            (target / name).unlink(missing_ok=True)
        container.seen[volume_id] = now

    def look(self, container, volume_id):
        """Give a container what is committed by now."""
        source, now = self.committed(volume_id), stats_of(self.committed(volume_id))
        seen = container.seen.setdefault(volume_id, {})
        copy_changed(source, container.volumes[volume_id], [name for name, stat in now.items() if seen.get(name) != stat])
        seen |= now

    def committed(self, volume_id):
        return self.root / "volumes" / volume_id

    def stop(self):
        self.apps.clear()
        for container in self.containers:
            if container.process and container.process.poll() is None:
                container.kill()
