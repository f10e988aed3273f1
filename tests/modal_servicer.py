"""A stand-in for Modal's service on loopback, written from the client's own published protocol (modal_proto), for `modal run` as a user types it.

Each input gets a container: a process of the client's real entrypoint in a folder of its own that holds the uploaded files and nothing else. A volume
has committed files, and every container a copy of them: what is not committed is not seen by others and not kept. Paths of the image under /vol and
/root lie under the container's folder. Not here: image builds, GPUs, auth, payloads over 2 MiB.
"""
import asyncio
import contextlib
import copy
import hashlib
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from dataclasses import dataclass, field
from pathlib import Path

from aiohttp import web
from google.protobuf.empty_pb2 import Empty
from grpclib.server import Server
from modal._serialization import deserialize_data_format
from modal._utils.grpc_testing import patch_mock_servicer
from modal._utils.jwt_utils import DecodedJwt
from modal_proto import api_pb2
from modal_proto.api_grpc import ModalClientBase

BLOCK = 8 * 1024 * 1024  # bytes of a volume's file that one URL serves
FAILURE, SUCCESS = api_pb2.GenericResult.GENERIC_STATUS_FAILURE, api_pb2.GenericResult.GENERIC_STATUS_SUCCESS


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
    """One process and the input it was started for; retries: how often its caller asked again after an error; kills: how many had this input and were killed."""

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


class Servicer(ModalClientBase):
    """root: where it keeps everything. edits: {text: replacement} in the uploaded modal_app.py, for a test's own settings.

    kill_when(container) -> bool, when set, is asked all the time; once it is true what the container wrote is committed, as the service does by itself
    every few seconds where the app allows it, and the container is killed. containers: all there were, in order.
    """

    def __init__(self, root, edits=None):
        self.root, self.edits, self.kill_when, self.stored_secrets = Path(root), edits or {}, None, {}
        self.containers, self.created, self.calls, self.logs, self.apps = [], {}, {}, {}, {}
        self.files, self.names, self.container, self.url, self.tasks = {}, {}, None, None, set()

    def keep(self, prefix, value):
        name = f"{prefix}-{len(self.created)}"
        self.created[name] = value
        return name

    # ---- app, image, mounts, secrets ----

    async def ClientHello(self, stream):
        await stream.recv_message()
        await stream.send_message(api_pb2.ClientHelloResponse())

    async def EnvironmentGetOrCreate(self, stream):
        await stream.recv_message()
        settings = api_pb2.EnvironmentSettings(image_builder_version="2025.06")
        await stream.send_message(api_pb2.EnvironmentGetOrCreateResponse(environment_id="en-1", metadata=api_pb2.EnvironmentMetadata(name="main", settings=settings)))

    async def AppCreate(self, stream):
        request = await stream.recv_message()
        app_id = self.keep("ap", request)
        self.logs[app_id] = asyncio.Queue()
        await stream.send_message(api_pb2.AppCreateResponse(app_id=app_id, app_page_url="http://loopback"))

    async def AppHeartbeat(self, stream):
        await stream.recv_message()
        await stream.send_message(Empty())

    async def AppPublish(self, stream):
        request = await stream.recv_message()
        self.apps[request.app_id] = request
        await stream.send_message(api_pb2.AppPublishResponse(url="http://loopback"))

    async def AppClientDisconnect(self, stream):
        request = await stream.recv_message()
        if self.created[request.app_id].app_state != api_pb2.APP_STATE_DETACHED:
            self.stop()
        self.logs[request.app_id].put_nowait(None)
        await stream.send_message(Empty())

    async def AppGetLogs(self, stream):
        request = await stream.recv_message()
        while text := await self.logs[request.app_id].get():
            await stream.send_message(api_pb2.TaskLogsBatch(entry_id="1", items=[api_pb2.TaskLogs(data=text, file_descriptor=api_pb2.FILE_DESCRIPTOR_STDOUT)]))
        await stream.send_message(api_pb2.TaskLogsBatch(app_done=True))

    async def ImageGetOrCreate(self, stream):
        request = await stream.recv_message()
        result = api_pb2.GenericResult(status=SUCCESS)
        await stream.send_message(api_pb2.ImageGetOrCreateResponse(image_id=self.keep("im", request.image), result=result))

    async def MountBatchedCheckExistence(self, stream):
        request = await stream.recv_message()
        await stream.send_message(api_pb2.MountBatchedCheckExistenceResponse(missing_sha256_hex_hashes=[sha for sha in request.sha256_hex_hashes if sha not in self.files]))

    async def MountPutFile(self, stream):
        request = await stream.recv_message()
        if request.data_blob_id or request.data:
            self.files[request.sha256_hex] = self.created[request.data_blob_id][0] if request.data_blob_id else request.data
        await stream.send_message(api_pb2.MountPutFileResponse(exists=request.sha256_hex in self.files))

    async def MountGetOrCreate(self, stream):
        request = await stream.recv_message()
        await stream.send_message(api_pb2.MountGetOrCreateResponse(mount_id=self.keep("mo", request)))

    async def BlobCreate(self, stream):
        await stream.recv_message()
        blob_id = self.keep("bl", [])
        await stream.send_message(api_pb2.BlobCreateResponse(blob_ids=[blob_id], upload_urls=api_pb2.UploadUrlList(items=[f"{self.url}/blob/{blob_id}"])))

    async def SecretGetOrCreate(self, stream):
        request = await stream.recv_message()
        values = self.stored_secrets[request.deployment_name] if request.deployment_name else dict(request.env_dict)
        await stream.send_message(api_pb2.SecretGetOrCreateResponse(secret_id=self.keep("st", values)))

    # ---- volumes ----

    async def VolumeGetOrCreate(self, stream):
        request = await stream.recv_message()
        volume_id = self.names.setdefault(request.deployment_name, f"vo-{len(self.names)}")
        self.committed(volume_id).mkdir(parents=True, exist_ok=True)
        await stream.send_message(api_pb2.VolumeGetOrCreateResponse(volume_id=volume_id, metadata=api_pb2.VolumeMetadata(name=request.deployment_name)))

    def committed(self, volume_id):
        return self.root / "volumes" / volume_id

    async def VolumeCommit(self, stream):
        request = await stream.recv_message()
        if not self.container.answered:  # after its output a container may stay warm, so its last commit is none that others could count on
            self.commit(self.container, request.volume_id)
        await stream.send_message(api_pb2.VolumeCommitResponse(skip_reload=True))

    def commit(self, container, volume_id):
        """Make what a container changed the committed state; of a file that two changed, the last one counts."""
        source, target, seen = container.volumes[volume_id], self.committed(volume_id), container.seen[volume_id]
        now = stats_of(source)
        copy_changed(source, target, [name for name, stat in now.items() if seen.get(name) != stat])
        for name in seen.keys() - now.keys():
            (target / name).unlink(missing_ok=True)
        container.seen[volume_id] = now

    async def VolumeReload(self, stream):
        request = await stream.recv_message()
        self.look(self.container, request.volume_id)
        await stream.send_message(Empty())

    def look(self, container, volume_id):
        """Give a container what is committed by now."""
        source, now = self.committed(volume_id), stats_of(self.committed(volume_id))
        seen = container.seen.setdefault(volume_id, {})
        copy_changed(source, container.volumes[volume_id], [name for name, stat in now.items() if seen.get(name) != stat])
        seen |= now

    async def VolumeListFiles(self, stream):
        request = await stream.recv_message()
        folder = self.committed(request.volume_id)
        paths = sorted((folder / request.path).rglob("*"))
        kind = lambda path: api_pb2.FileEntry.DIRECTORY if path.is_dir() else api_pb2.FileEntry.FILE
        entries = [api_pb2.FileEntry(path=str(path.relative_to(folder)), type=kind(path), size=path.stat().st_size) for path in paths]
        await stream.send_message(api_pb2.VolumeListFilesResponse(entries=entries))

    async def VolumeGetFile2(self, stream):
        request = await stream.recv_message()
        size = (self.committed(request.volume_id) / request.path).stat().st_size
        urls = [f"{self.url}/file/{start}/{request.volume_id}/{request.path}" for start in range(0, size, BLOCK)]
        await stream.send_message(api_pb2.VolumeGetFile2Response(get_urls=urls, size=size, start=0, len=size))

    async def serve_file(self, request):
        with (self.committed(request.match_info["volume"]) / request.match_info["path"]).open("rb") as file:
            file.seek(int(request.match_info["start"]))
            return web.Response(body=file.read(BLOCK))

    async def take_blob(self, request):
        body = await request.read()
        self.created[request.match_info["blob"]].append(body)
        return web.Response(headers={"ETag": f'"{hashlib.md5(body).hexdigest()}"'})

    # ---- functions and their inputs ----

    def handle(self, function_id):
        function = self.created[function_id]
        return api_pb2.FunctionHandleMetadata(function_name=function.function_name, function_type=api_pb2.Function.FUNCTION_TYPE_FUNCTION, definition_id=function_id,
                                              supported_input_formats=function.supported_input_formats, supported_output_formats=function.supported_output_formats)

    async def FunctionPrecreate(self, stream):
        request = await stream.recv_message()
        function_id = request.existing_function_id or self.keep("fu", api_pb2.Function(function_name=request.function_name))
        await stream.send_message(api_pb2.FunctionPrecreateResponse(function_id=function_id, handle_metadata=self.handle(function_id)))

    async def FunctionCreate(self, stream):
        request = await stream.recv_message()
        data = request.function_data
        if not request.HasField("function_data"):
            data = api_pb2.FunctionData(ranked_functions=[api_pb2.FunctionData.RankedFunction(function=request.function)])
        function_id, self.created[request.existing_function_id] = request.existing_function_id, data.ranked_functions[0].function
        await stream.send_message(api_pb2.FunctionCreateResponse(function_id=function_id, handle_metadata=self.handle(function_id), function_data=data))

    async def FunctionBindParams(self, stream):
        """with_options: the function with other settings; secrets replace its own, as in the service."""
        request = await stream.recv_message()
        function, options = copy.deepcopy(self.created[request.function_id]), request.function_options
        if options.replace_secret_ids:
            del function.secret_ids[:]
            function.secret_ids.extend(options.secret_ids)
        function.resources.MergeFrom(options.resources)
        bound = self.keep("fu", function)
        await stream.send_message(api_pb2.FunctionBindParamsResponse(bound_function_id=bound, handle_metadata=self.handle(bound)))

    async def FunctionMap(self, stream):
        request = await stream.recv_message()
        call = Call(request.function_id, request)
        call_id = self.keep("fc", call)
        policy = copy.deepcopy(self.created[request.function_id].retry_policy)
        policy.initial_delay_ms = min(policy.initial_delay_ms, 100)  # the wait itself is not what is tried
        await stream.send_message(api_pb2.FunctionMapResponse(
            function_call_id=call_id, function_call_jwt=call_id, pipelined_inputs=self.take(call, call_id, request.pipelined_inputs), retry_policy=policy,
            sync_client_retries_enabled=True, max_inputs_outstanding=100))

    async def FunctionPutInputs(self, stream):
        request = await stream.recv_message()
        items = self.take(self.created[request.function_call_id], request.function_call_id, request.inputs)
        await stream.send_message(api_pb2.FunctionPutInputsResponse(inputs=items))

    def take(self, call, call_id, items):
        """Start a container for each input; returns what the caller is told of them."""
        told = []
        for item in items:
            input_id = self.keep("in", call_id)
            call.inputs[input_id] = (item.idx, item.input)
            self.start(call, input_id)
            told.append(api_pb2.FunctionPutInputsResponseItem(idx=item.idx, input_id=input_id, input_jwt=self.ticket(call, input_id)))
        return told

    def ticket(self, call, input_id):
        return DecodedJwt.encode_without_signature({"idx": call.inputs[input_id][0], "input": input_id})

    async def FunctionRetryInputs(self, stream):
        """The caller's own retries, after an error that its function raised."""
        request = await stream.recv_message()
        call = self.created[request.function_call_jwt]
        for item in request.inputs:
            self.start(call, DecodedJwt.decode_without_verification(item.input_jwt).payload["input"], item.retry_count or 1)
        await stream.send_message(api_pb2.FunctionRetryInputsResponse(input_jwts=[item.input_jwt for item in request.inputs]))

    async def FunctionGetOutputs(self, stream):
        request = await stream.recv_message()
        call, first = self.created[request.function_call_id], int(request.last_entry_id.split("-")[0] or 0)
        async with call.arrived:
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(call.arrived.wait_for(lambda: len(call.outputs) > first), min(request.timeout, 50))
            outputs, last = call.outputs[first:], len(call.outputs)
            if request.clear_on_success:
                call.outputs.clear()
        left = len(call.inputs) - last
        await stream.send_message(api_pb2.FunctionGetOutputsResponse(outputs=outputs, last_entry_id=f"{last}-0", num_unfinished_inputs=max(left, 0)))

    # ---- containers ----

    def start(self, call, input_id, retries=0, kills=0):
        function, item = self.created[call.function_id], call.inputs[input_id][1]
        positional, named = deserialize_data_format(item.args, item.data_format, None)
        container = Container(function.function_name, (*positional, *named.values()), self.root / f"container-{len(self.containers)}", call, input_id, retries, kills)
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
            [sys.executable, "-m", "modal._container_entrypoint"], cwd=container.root / "root", start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            env=container.environment | {"MODAL_SERVER_URL": f"unix://{socket}"})
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
        arguments = api_pb2.ContainerArguments(task_id=container.root.name, function_id=function_ids[function.function_name], app_id=app_id, function_def=function,
                                               app_layout=api_pb2.AppLayout(objects=objects, function_ids=function_ids))
        (container.root / "arguments").write_bytes(arguments.SerializeToString())

    async def ContainerHello(self, stream):
        await stream.recv_message()
        await stream.send_message(Empty())

    async def ContainerHeartbeat(self, stream):
        await stream.recv_message()
        await stream.send_message(api_pb2.ContainerHeartbeatResponse())

    async def FunctionGetInputs(self, stream):
        await stream.recv_message()
        item, container = api_pb2.FunctionGetInputsItem(kill_switch=True), self.container
        if not container.given:
            container.given = True
            item = api_pb2.FunctionGetInputsItem(input_id=container.input_id, input=container.call.inputs[container.input_id][1], retry_count=container.retries,
                                                 function_call_invocation_type=container.call.request.function_call_invocation_type)
        await stream.send_message(api_pb2.FunctionGetInputsResponse(inputs=[item]))

    async def FunctionPutOutputs(self, stream):
        request = await stream.recv_message()
        for item in request.outputs:
            await self.answer(item.result, item.data_format)
        await stream.send_message(Empty())

    async def TaskResult(self, stream):
        """The container could not even load the function."""
        request = await stream.recv_message()
        await self.answer(request.result, api_pb2.DATA_FORMAT_PICKLE)
        await stream.send_message(Empty())

    async def answer(self, result, data_format):
        container, call = self.container, self.container.call
        container.answered = True
        async with call.arrived:
            call.outputs.append(api_pb2.FunctionGetOutputsItem(result=result, idx=call.inputs[container.input_id][0], input_id=container.input_id,
                                                               data_format=data_format, retry_count=container.retries, task_id=container.root.name))
            call.arrived.notify_all()

    def stop(self):
        self.apps.clear()
        for container in self.containers:
            if container.process and container.process.poll() is None:
                container.kill()


Service = patch_mock_servicer(Servicer)


@contextlib.contextmanager
def serve(root, edits=None):
    """A servicer on a unix socket, in a thread of its own; what it started is ended with it."""
    servicer, loop = Service(root, edits), asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()

    async def begin():
        application = web.Application(client_max_size=2**26)
        application.add_routes([web.get("/file/{start}/{volume}/{path:.*}", servicer.serve_file), web.put("/blob/{blob}", servicer.take_blob)])
        runner = web.AppRunner(application)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        servicer.url = f"http://127.0.0.1:{site._server.sockets[0].getsockname()[1]}"
        server = Server([servicer])
        await server.start(path=str(Path(root) / "socket"))
        return server, runner

    async def end(server, runner):
        servicer.stop()
        server.close()
        await runner.cleanup()

    begun = asyncio.run_coroutine_threadsafe(begin(), loop).result(20)
    yield servicer
    asyncio.run_coroutine_threadsafe(end(*begun), loop).result(20)
    loop.call_soon_threadsafe(loop.stop)
    thread.join(20)


def modal_start(servicer, folder, app, *arguments):
    """`modal run` as a user types it, in `folder`: the process, with stdout and stderr together in its stdout."""
    environment = {"PATH": os.environ["PATH"], "HOME": str(servicer.root), "MODAL_SERVER_URL": f"unix://{servicer.root / 'socket'}", "TERM": "dumb",
                   "MODAL_TOKEN_ID": "ak-loopback", "MODAL_TOKEN_SECRET": "as-loopback"}
    options = [argument for argument in arguments if argument == "--detach"]
    command = [sys.executable, "-m", "modal", "run", *options, str(app), *(argument for argument in arguments if argument not in options)]
    return subprocess.Popen(command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def modal_run(servicer, folder, app, *arguments):
    """(exit code, what it printed) of `modal run`."""
    with modal_start(servicer, folder, app, *arguments) as process:
        try:
            printed, _ = process.communicate(timeout=280)
        finally:
            process.kill()
    return process.returncode, printed
