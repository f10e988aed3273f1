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
import signal
import subprocess
import sys
import threading
from pathlib import Path

from aiohttp import web
from google.protobuf.empty_pb2 import Empty
from grpclib.server import Server
from modal._utils.grpc_testing import patch_mock_servicer
from modal._utils.jwt_utils import DecodedJwt
from modal_containers import Call, Containers
from modal_proto import api_pb2
from modal_proto.api_grpc import ModalClientBase

BLOCK = 8 * 1024 * 1024  # bytes of a volume's file that one URL serves


def rpc(method):
    """A call of the protocol from a method of its request that returns the response."""
    async def served(self, stream):
        await stream.send_message(await method(self, await stream.recv_message()))
    return served


class Servicer(Containers, ModalClientBase):
    """root: where it keeps everything. edits: {text: replacement} in the uploaded modal_app.py, for a test's own settings.

    kill_when(container) -> bool, when set, is asked all the time; once it is true what the container wrote is committed, as the service does by itself
    every few seconds where the app allows it, and the container is killed. containers: all there were, in order.
    """

    def __init__(self, root, edits=None):
        self.root, self.edits, self.kill_when, self.stored_secrets = Path(root), edits or {}, None, {}
        self.containers, self.created, self.logs, self.apps = [], {}, {}, {}
        self.files, self.names, self.container, self.url, self.tasks = {}, {}, None, None, set()

    def keep(self, prefix, value):
        name = f"{prefix}-{len(self.created)}"
        self.created[name] = value
        return name

    # ---- app, image, mounts, secrets ----

    async def EnvironmentGetOrCreate(self, request):
        settings = api_pb2.EnvironmentSettings(image_builder_version="2025.06")
        return api_pb2.EnvironmentGetOrCreateResponse(environment_id="en-1", metadata=api_pb2.EnvironmentMetadata(name="main", settings=settings))

    async def AppCreate(self, request):
        app_id = self.keep("ap", request)
        self.logs[app_id] = asyncio.Queue()
        return api_pb2.AppCreateResponse(app_id=app_id, app_page_url="http://loopback")

    async def AppPublish(self, request):
        self.apps[request.app_id] = request
        return api_pb2.AppPublishResponse(url="http://loopback")

    async def AppClientDisconnect(self, request):
        if self.created[request.app_id].app_state != api_pb2.APP_STATE_DETACHED:
            self.stop()
        self.logs[request.app_id].put_nowait(None)
        return Empty()

    async def AppGetLogs(self, stream):
        request = await stream.recv_message()
        while text := await self.logs[request.app_id].get():
            await stream.send_message(api_pb2.TaskLogsBatch(entry_id="1", items=[api_pb2.TaskLogs(data=text, file_descriptor=api_pb2.FILE_DESCRIPTOR_STDOUT)]))
        await stream.send_message(api_pb2.TaskLogsBatch(app_done=True))

    async def ImageGetOrCreate(self, request):
        result = api_pb2.GenericResult(status=api_pb2.GenericResult.GENERIC_STATUS_SUCCESS)
        return api_pb2.ImageGetOrCreateResponse(image_id=self.keep("im", request.image), result=result)

    async def MountBatchedCheckExistence(self, request):
        return api_pb2.MountBatchedCheckExistenceResponse(missing_sha256_hex_hashes=[sha for sha in request.sha256_hex_hashes if sha not in self.files])

    async def MountPutFile(self, request):
        if request.data_blob_id or request.data:
            self.files[request.sha256_hex] = self.created[request.data_blob_id][0] if request.data_blob_id else request.data
        return api_pb2.MountPutFileResponse(exists=request.sha256_hex in self.files)

    async def MountGetOrCreate(self, request):
        return api_pb2.MountGetOrCreateResponse(mount_id=self.keep("mo", request))

    async def BlobCreate(self, request):
        blob_id = self.keep("bl", [])
        return api_pb2.BlobCreateResponse(blob_ids=[blob_id], upload_urls=api_pb2.UploadUrlList(items=[f"{self.url}/blob/{blob_id}"]))

    async def SecretGetOrCreate(self, request):
        values = self.stored_secrets[request.deployment_name] if request.deployment_name else dict(request.env_dict)
        return api_pb2.SecretGetOrCreateResponse(secret_id=self.keep("st", values))

    # ---- volumes ----

    async def VolumeGetOrCreate(self, request):
        volume_id = self.names.setdefault(request.deployment_name, f"vo-{len(self.names)}")
        self.committed(volume_id).mkdir(parents=True, exist_ok=True)
        return api_pb2.VolumeGetOrCreateResponse(volume_id=volume_id, metadata=api_pb2.VolumeMetadata(name=request.deployment_name))

    async def VolumeCommit(self, request):
        if not self.container.answered:  # after its output a container may stay warm, so its last commit is none that others could count on
            self.commit(self.container, request.volume_id)
        return api_pb2.VolumeCommitResponse(skip_reload=True)

    async def VolumeReload(self, request):
        self.look(self.container, request.volume_id)
        return Empty()

    async def VolumeListFiles(self, request):
        folder = self.committed(request.volume_id)
        paths = sorted((folder / request.path).rglob("*"))
        kind = lambda path: api_pb2.FileEntry.DIRECTORY if path.is_dir() else api_pb2.FileEntry.FILE
        entries = [api_pb2.FileEntry(path=str(path.relative_to(folder)), type=kind(path), size=path.stat().st_size) for path in paths]
        return api_pb2.VolumeListFilesResponse(entries=entries)

    async def VolumeGetFile2(self, request):
        size = (self.committed(request.volume_id) / request.path).stat().st_size
        urls = [f"{self.url}/file/{start}/{request.volume_id}/{request.path}" for start in range(0, size, BLOCK)]
        return api_pb2.VolumeGetFile2Response(get_urls=urls, size=size, start=0, len=size)

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
        return api_pb2.FunctionHandleMetadata(
            function_name=function.function_name, function_type=api_pb2.Function.FUNCTION_TYPE_FUNCTION, definition_id=function_id,
            supported_input_formats=function.supported_input_formats, supported_output_formats=function.supported_output_formats)

    async def FunctionPrecreate(self, request):
        function_id = request.existing_function_id or self.keep("fu", api_pb2.Function(function_name=request.function_name))
        return api_pb2.FunctionPrecreateResponse(function_id=function_id, handle_metadata=self.handle(function_id))

    async def FunctionCreate(self, request):
        data = request.function_data
        if not request.HasField("function_data"):
            data = api_pb2.FunctionData(ranked_functions=[api_pb2.FunctionData.RankedFunction(function=request.function)])
        function_id, self.created[request.existing_function_id] = request.existing_function_id, data.ranked_functions[0].function
        return api_pb2.FunctionCreateResponse(function_id=function_id, handle_metadata=self.handle(function_id), function_data=data)

    async def FunctionBindParams(self, request):
        """with_options: the function with other settings; secrets replace its own, as in the service."""
        function, options = copy.deepcopy(self.created[request.function_id]), request.function_options
        if options.replace_secret_ids:
            del function.secret_ids[:]
            function.secret_ids.extend(options.secret_ids)
        function.resources.MergeFrom(options.resources)
        bound = self.keep("fu", function)
        return api_pb2.FunctionBindParamsResponse(bound_function_id=bound, handle_metadata=self.handle(bound))

    async def FunctionMap(self, request):
        call = Call(request.function_id, request)
        call_id = self.keep("fc", call)
        policy = copy.deepcopy(self.created[request.function_id].retry_policy)
        policy.initial_delay_ms = min(policy.initial_delay_ms, 100)  # the wait itself is not what is tried
        return api_pb2.FunctionMapResponse(
            function_call_id=call_id, function_call_jwt=call_id, pipelined_inputs=self.take(call, call_id, request.pipelined_inputs), retry_policy=policy,
            sync_client_retries_enabled=True, max_inputs_outstanding=100)

    async def FunctionPutInputs(self, request):
        items = self.take(self.created[request.function_call_id], request.function_call_id, request.inputs)
        return api_pb2.FunctionPutInputsResponse(inputs=items)

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

    async def FunctionRetryInputs(self, request):
        """The caller's own retries, after an error that its function raised."""
        call = self.created[request.function_call_jwt]
        for item in request.inputs:
            input_id = DecodedJwt.decode_without_verification(item.input_jwt).payload["input"]
            self.start(call, input_id, 1 + max(container.retries for container in self.containers if container.input_id == input_id))
        return api_pb2.FunctionRetryInputsResponse(input_jwts=[item.input_jwt for item in request.inputs])

    async def FunctionGetOutputs(self, request):
        call, first = self.created[request.function_call_id], int(request.last_entry_id.split("-")[0] or 0)
        async with call.arrived:
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(call.arrived.wait_for(lambda: len(call.outputs) > first), min(request.timeout, 50))
            outputs, last = call.outputs[first:], len(call.outputs)
            if request.clear_on_success:
                call.outputs.clear()
        left = len(call.inputs) - last
        return api_pb2.FunctionGetOutputsResponse(outputs=outputs, last_entry_id=f"{last}-0", num_unfinished_inputs=max(left, 0))

    # ---- what a container asks ----

    async def FunctionGetInputs(self, request):
        item, container = api_pb2.FunctionGetInputsItem(kill_switch=True), self.container
        if not container.given:
            container.given = True
            item = api_pb2.FunctionGetInputsItem(input_id=container.input_id, input=container.call.inputs[container.input_id][1], retry_count=container.retries,
                                                 function_call_invocation_type=container.call.request.function_call_invocation_type)
        return api_pb2.FunctionGetInputsResponse(inputs=[item])

    async def FunctionPutOutputs(self, request):
        for item in request.outputs:
            await self.answer(item.result, item.data_format)
        return Empty()

    async def TaskResult(self, request):
        """The container could not even load the function."""
        await self.answer(request.result, api_pb2.DATA_FORMAT_PICKLE)
        return Empty()

    async def answer(self, result, data_format):
        container, call = self.container, self.container.call
        container.answered = True
        async with call.arrived:
            call.outputs.append(api_pb2.FunctionGetOutputsItem(result=result, idx=call.inputs[container.input_id][0], input_id=container.input_id,
                                                               data_format=data_format, retry_count=container.retries, task_id=container.root.name))
            call.arrived.notify_all()

def told(response):
    async def answer(self, request):
        return response()
    return answer


NOTHING_TO_SAY = {"ClientHello": api_pb2.ClientHelloResponse, "AppHeartbeat": Empty, "ContainerHello": Empty,
                  "ContainerHeartbeat": api_pb2.ContainerHeartbeatResponse}
ANSWERS = {name: method for name, method in vars(Servicer).items() if name[0].isupper() and name != "AppGetLogs"}  # that one is a stream
ANSWERS |= {name: told(response) for name, response in NOTHING_TO_SAY.items()}
Service = patch_mock_servicer(type("Service", (Servicer,), {name: rpc(method) for name, method in ANSWERS.items()}))


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
    try:
        yield servicer
    finally:
        asyncio.run_coroutine_threadsafe(end(*begun), loop).result(20)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(20)


def modal_start(servicer, folder, app, *arguments):
    """`modal run` as a user types it, in `folder`: the process, with stdout and stderr together in its stdout."""
    environment = {"PATH": os.environ["PATH"], "HOME": str(servicer.root), "MODAL_SERVER_URL": f"unix://{servicer.root / 'socket'}", "TERM": "dumb",
                   "MODAL_TOKEN_ID": "ak-loopback", "MODAL_TOKEN_SECRET": "as-loopback"}
    options = [argument for argument in arguments if argument == "--detach"]
    command = [sys.executable, "-m", "modal", "run", *options, str(app), *(argument for argument in arguments if argument not in options)]
    heeds = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # also where the suite runs in the background
    return subprocess.Popen(command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, preexec_fn=heeds)


def modal_run(servicer, folder, app, *arguments):
    """(exit code, what it printed) of `modal run`."""
    with modal_start(servicer, folder, app, *arguments) as process:
        try:
            printed, _ = process.communicate(timeout=280)
        finally:
            process.kill()
    return process.returncode, printed
