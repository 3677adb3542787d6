"""cluster.yaml and jobs/*.yaml: valid without a cloud account, and closed to the world once `ray up` is done with it.

`ray up` has no dry run. Its own validation runs offline, and its own preparation runs here against moto's AWS.
"""

import argparse
import ipaddress
import re
import shlex
import subprocess
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import boto3
import jsonschema
import pytest
import yaml
from moto import mock_aws
from ray.autoscaler._private.commands import _bootstrap_config
from ray.autoscaler._private.util import prepare_config, validate_config

from batch_rerank.config import load_config
from batch_rerank.errors import ConfigError

REPOSITORY = Path(__file__).parent.parent
CLUSTER = REPOSITORY / "cluster.yaml"
Config = dict[str, Any]


@pytest.fixture
def cluster() -> Config:
    config: Config = yaml.safe_load(CLUSTER.read_text())
    return config


def test_ray_accepts_it(cluster: Config) -> None:
    validate_config(prepare_config(cluster))


@pytest.mark.parametrize(
    ("place", "key", "value"),
    [
        ((), "idle_timeout_minute", 5),
        (("available_node_types", "gpu"), "max_worker", 8),
        (("available_node_types", "gpu"), "min_workers", "none"),
        (("available_node_types", "gpu"), "min_workers", 9),
        (("auth",), "user", "ubuntu"),
        ((), "head_node_type", "gpus"),
    ],
)
def test_ray_refuses_a_broken_copy(cluster: Config, place: tuple[str, ...], key: str, value: object) -> None:
    section = cluster
    for name in place:
        section = section[name]
    section[key] = value
    with pytest.raises((jsonschema.ValidationError, ValueError)):
        validate_config(prepare_config(cluster))


def test_a_cpu_head_and_spot_gpu_workers_that_come_and_go(cluster: Config) -> None:
    types = prepare_config(cluster)["available_node_types"]
    head, gpu = types["head"], types["gpu"]
    assert cluster["head_node_type"] == "head"
    assert head["max_workers"] == 0, "a head type is no worker type"
    assert 0 <= gpu["min_workers"] < gpu["max_workers"] <= cluster["max_workers"]
    assert gpu["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}
    assert "InstanceMarketOptions" not in head["node_config"], "a reclaimed head would end the job"
    assert 0 < cluster["idle_timeout_minutes"] <= 15
    assert cluster["provider"]["cache_stopped_nodes"] is False


def test_every_node_starts_with_token_authentication_and_has_the_token(cluster: Config) -> None:
    home = f"/home/{cluster['auth']['ssh_user']}"
    assert cluster["file_mounts"][f"{home}/.ray/auth_token"] == "~/.ray/auth_token"
    for commands in (cluster["head_start_ray_commands"], cluster["worker_start_ray_commands"]):
        starts = [command for command in commands if "ray start" in command]
        assert len(starts) == 1
        assert "RAY_AUTH_MODE=token ray start" in starts[0]
    assert "--dashboard-host=127.0.0.1" in cluster["head_start_ray_commands"][-1]


def test_what_is_copied_to_the_nodes_is_in_the_repository(cluster: Config) -> None:
    local = [path for path in cluster["file_mounts"].values() if not path.startswith("~")]
    assert {"batch_rerank", "pyproject.toml", "constraints.txt"} <= set(local)
    assert [path for path in local if not (REPOSITORY / path).exists()] == []


def test_the_commands_are_valid_bash(cluster: Config) -> None:
    commands = [command for key, value in cluster.items() if key.endswith("_commands") for command in value]
    assert len(commands) >= 6
    for command in commands:
        subprocess.run(["bash", "-n", "-c", command], check=True)


# ---- what is open, after `ray up` has prepared everything


@pytest.fixture
def aws(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """An AWS account with nothing but the defaults. Ray writes its SSH key below HOME."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("AWS_PROFILE", raising=False)
    with mock_aws():
        yield boto3.client("ec2", "us-east-1")


def commands_of_the_header(name: str) -> list[argparse.Namespace]:
    """The `aws ec2 <name> …` commands that cluster.yaml tells its reader to run."""
    parser = argparse.ArgumentParser(exit_on_error=False)
    for option in ("region", "group-name", "description", "protocol", "port", "cidr", "source-group"):
        parser.add_argument(f"--{option}")
    lines = re.findall(rf"^#\s+aws ec2 {name} (.*)$", CLUSTER.read_text(), re.MULTILINE)
    return [parser.parse_args(shlex.split(line)) for line in lines]


def follow_the_header(ec2: Any) -> str:
    """Run those commands; the id of the security group they make."""
    (create,) = commands_of_the_header("create-security-group")
    group = ec2.create_security_group(GroupName=create.group_name, Description=create.description)["GroupId"]
    for rule in commands_of_the_header("authorize-security-group-ingress"):
        assert rule.group_name == create.group_name
        permission: Config = {"IpProtocol": "-1" if rule.protocol == "all" else rule.protocol}
        if rule.port:
            permission |= {"FromPort": int(rule.port), "ToPort": int(rule.port)}
        if rule.cidr:
            permission["IpRanges"] = [{"CidrIp": rule.cidr}]
        if rule.source_group:
            assert rule.source_group == create.group_name
            permission["UserIdGroupPairs"] = [{"GroupId": group}]
        ec2.authorize_security_group_ingress(GroupId=group, IpPermissions=[permission])
    return str(group)


def ray_up(config: Config) -> Config:
    """All that `ray up` does before it starts the head."""
    resolved: Config = _bootstrap_config(config, no_config_cache=True)
    return resolved


def ingress(ec2: Any, config: Config) -> set[tuple[str, str, int | None]]:
    """Who may reach any node, by which protocol, on which port."""
    groups = {
        group for node in config["available_node_types"].values() for group in node["node_config"]["SecurityGroupIds"]
    }
    found = set()
    for group in ec2.describe_security_groups(GroupIds=sorted(groups))["SecurityGroups"]:
        for rule in group["IpPermissions"]:
            assert rule.get("FromPort") == rule.get("ToPort")
            sources = [source["CidrIp"] for source in rule["IpRanges"]]
            sources += [source["CidrIpv6"] for source in rule["Ipv6Ranges"]]
            sources += [
                "own nodes" if pair["GroupId"] in groups else pair["GroupId"] for pair in rule["UserIdGroupPairs"]
            ]
            found |= {(source, rule["IpProtocol"], rule.get("FromPort")) for source in sources}
    return found


def test_only_ssh_from_the_stated_range_is_open(cluster: Config, aws: Any) -> None:
    group = follow_the_header(aws)
    for node in cluster["available_node_types"].values():
        node["node_config"]["SecurityGroupIds"] = [group]
    stated = commands_of_the_header("authorize-security-group-ingress")[0].cidr
    assert ingress(aws, ray_up(cluster)) == {(stated, "tcp", 22), ("own nodes", "-1", None)}
    assert ipaddress.ip_network(stated).num_addresses <= 256


def test_ray_itself_would_open_ssh_to_the_world_whatever_the_provider_section_says(cluster: Config, aws: Any) -> None:
    for node in cluster["available_node_types"].values():
        del node["node_config"]["SecurityGroupIds"]
    rule = {"FromPort": 22, "ToPort": 22, "IpProtocol": "tcp", "IpRanges": [{"CidrIp": "203.0.113.0/24"}]}
    cluster["provider"]["security_group"] = {"GroupName": "own", "IpPermissions": [rule]}
    assert ("0.0.0.0/0", "tcp", 22) in ingress(aws, ray_up(cluster))


def test_the_placeholder_group_stops_ray_up_until_it_is_replaced(
    cluster: Config, aws: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(AssertionError):
        ray_up(cluster)
    assert "Failed to detect a security group" in capsys.readouterr().err


# ---- the example job


@pytest.mark.parametrize("path", sorted((REPOSITORY / "jobs").glob("*.yaml")), ids=lambda path: path.name)
def test_the_job_file_is_valid(path: Path) -> None:
    config = load_config(path, ["output.path=s3://bucket/tonight"])
    assert config.output.path == "s3://bucket/tonight"
    with pytest.raises(ConfigError, match="unknown key"):
        load_config(path, ["scoring.max_failed_row=0.5"])


def test_the_example_job_fits_on_the_example_cluster(cluster: Config, aws: Any) -> None:
    group = follow_the_header(aws)
    for node in cluster["available_node_types"].values():
        node["node_config"]["SecurityGroupIds"] = [group]
    gpu = ray_up(deepcopy(cluster))["available_node_types"]["gpu"]
    job = load_config(REPOSITORY / "jobs" / "rerank.yaml").cluster
    per_node = gpu["resources"]["GPU"] // job.gpus_per_actor
    assert per_node * gpu["max_workers"] >= job.max_actors
    assert per_node * job.cpus_per_actor < gpu["resources"]["CPU"], "reading and tokenising need CPUs too"
