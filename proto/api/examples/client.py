"""A client of the API in Python, made with grpcio-tools from the .proto files.

    python3 -m venv venv && venv/bin/pip install grpcio grpcio-tools
    venv/bin/python -m grpc_tools.protoc -I proto/api/proto --python_out=out --grpc_python_out=out \
        $(find proto/api/proto -name '*.proto')
    PYTHONPATH=out venv/bin/python proto/api/examples/client.py 127.0.0.1:7070 [TOKEN_FILE]

It does what client.rs beside it does.
"""

import sys

import grpc

from google.rpc import error_details_pb2, status_pb2
from mortise.controller.v1 import (
    operations_pb2,
    operations_pb2_grpc,
    projects_pb2,
    projects_pb2_grpc,
    volumes_pb2,
    volumes_pb2_grpc,
    watches_pb2,
    watches_pb2_grpc,
)

PATIENCE_SECONDS = 60


def finished(channel, operation):
    """Waits for a long-running operation."""
    request = operations_pb2.WaitOperationRequest(
        name=operation.name, timeout_ms=PATIENCE_SECONDS * 1000
    )
    operation = operations_pb2_grpc.OperationsStub(channel).WaitOperation(request)
    if not operation.done:
        raise SystemExit(f"{operation.name} is not done in time")
    if operation.HasField("error"):
        raise SystemExit(operation.error.message)


def error_info(error):
    """The google.rpc.ErrorInfo of an error."""
    for key, value in error.trailing_metadata():
        if key == "grpc-status-details-bin":
            for detail in status_pb2.Status.FromString(value).details:
                info = error_details_pb2.ErrorInfo()
                if detail.Unpack(info):
                    return info
    raise SystemExit(f"no ErrorInfo in {error}")


def main():
    channel = grpc.insecure_channel(sys.argv[1])
    if len(sys.argv) > 2:
        with open(sys.argv[2], encoding="ascii") as file:
            token = file.readline().strip()
        channel = grpc.intercept_channel(channel, Bearer(token))
    grpc.channel_ready_future(channel).result(timeout=PATIENCE_SECONDS)
    projects = projects_pb2_grpc.ProjectsStub(channel)
    volumes = volumes_pb2_grpc.VolumesStub(channel)

    # A request with a request_id may be sent again: it is done once.
    request = projects_pb2.CreateProjectRequest(
        project_id="python-example",
        project=projects_pb2.Project(quota=projects_pb2.Quota(volumes=1)),
        request_id="python-example-1",
    )
    project = projects.CreateProject(request)
    assert projects.CreateProject(request).uid == project.uid

    # List, then watch from where the list ends: nothing is missed in between.
    ready = volumes_pb2.ListVolumesRequest(
        parent=project.name, filter="status.phase = ready"
    )
    listed = volumes.ListVolumes(ready)
    assert not listed.volumes
    changes = watches_pb2_grpc.WatchesStub(channel).WatchResources(
        watches_pb2.WatchResourcesRequest(
            parent=project.name,
            kind=watches_pb2.RESOURCE_KIND_VOLUME,
            resume_token=listed.resume_token,
        ),
        timeout=PATIENCE_SECONDS,
    )

    create = volumes_pb2.CreateVolumeRequest(
        parent=project.name,
        volume_id="data",
        volume=volumes_pb2.Volume(spec=volumes_pb2.VolumeSpec(size_bytes=1 << 20)),
        request_id="python-example-2",
    )
    finished(channel, volumes.CreateVolume(create))
    for message in changes:
        if message.WhichOneof("change") == "put":
            print(f"the watch told of {message.put.volume.name}")
            break
    changes.cancel()
    assert len(volumes.ListVolumes(ready).volumes) == 1

    # Errors carry a stable reason and what the message names.
    create.volume_id = "more"
    create.request_id = ""
    try:
        volumes.CreateVolume(create)
        raise SystemExit("the quota is one volume")
    except grpc.RpcError as error:
        assert error.code() == grpc.StatusCode.RESOURCE_EXHAUSTED, error
        info = error_info(error)
        assert info.reason == "QUOTA_EXCEEDED", info
        print(f"refused: {info.reason} {error.details()}")

    name = f"{project.name}/volumes/data"
    finished(channel, volumes.DeleteVolume(volumes_pb2.DeleteVolumeRequest(name=name)))
    projects.DeleteProject(projects_pb2.DeleteProjectRequest(name=project.name))
    print("done")


class Bearer(grpc.UnaryUnaryClientInterceptor, grpc.UnaryStreamClientInterceptor):
    """Says who asks."""

    def __init__(self, token):
        self.header = ("authorization", f"Bearer {token}")

    def with_token(self, details):
        metadata = [*(details.metadata or []), self.header]
        return details._replace(metadata=metadata)

    def intercept_unary_unary(self, continuation, details, request):
        return continuation(self.with_token(details), request)

    def intercept_unary_stream(self, continuation, details, request):
        return continuation(self.with_token(details), request)


if __name__ == "__main__":
    main()
