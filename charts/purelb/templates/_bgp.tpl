{{/*
The kinds of nodes that a routing daemon runs on, as a list in YAML: each has name, nodeSelector, localAS and neighbors.
bgp.nodes lists them; without it there is one kind, of all nodes.
*/}}
{{- define "purelb.bgp.kinds" -}}
{{- $bgp := .Values.bgp }}
{{- range $bgp.nodes | default (list dict) }}
- name: {{ .name | default "" | quote }}
  nodeSelector: {{ .nodeSelector | default dict | toJson }}
  localAS: {{ .localAS | default $bgp.localAS | int64 }}
  neighbors: {{ concat ($bgp.neighbors | default list) (.neighbors | default list) | toJson }}
{{- end }}
{{- end }}

{{/* Refuses what no daemon could work with, in words. */}}
{{- define "purelb.bgp.check" -}}
{{- $bgp := .Values.bgp }}
{{- if and .Values.bird.enabled .Values.frr.enabled }}
{{- fail "bird.enabled and frr.enabled: a node has one BGP port, enable one of them" }}
{{- end }}
{{- if .Values.lbnodeagent.routingDaemon }}
{{- fail "lbnodeagent.routingDaemon is for a daemon of your own: leave it empty with bird.enabled or frr.enabled" }}
{{- end }}
{{- if not .Values.lbnodeagent.enabled }}
{{- fail "bird.enabled and frr.enabled need lbnodeagent.enabled: without it nothing puts addresses on the interface they announce" }}
{{- end }}
{{- range $bgp.nodes }}
{{- if not (and .name .nodeSelector) }}
{{- fail "bgp.nodes: each needs a name and a nodeSelector" }}
{{- end }}
{{- end }}
{{- range $kind := include "purelb.bgp.kinds" . | fromYamlArray }}
{{- $where := empty $kind.name | ternary "bgp" (printf "bgp.nodes, %s" $kind.name) }}
{{- if not $kind.localAS }}
{{- fail (printf "%s: localAS is missing, the AS number of the nodes" $where) }}
{{- end }}
{{- if not $kind.neighbors }}
{{- fail (printf "%s: neighbors is empty, so no router would hear of any address" $where) }}
{{- end }}
{{- range $kind.neighbors }}
{{- if not (and .address .as) }}
{{- fail (printf "%s: the neighbor %s needs an address and an as" $where (toJson .)) }}
{{- end }}
{{- if not (regexMatch "^([0-9]{1,3}(\\.[0-9]{1,3}){3}|[0-9a-fA-F:]*:[0-9a-fA-F:.]*)$" .address) }}
{{- fail (printf "%s: the neighbor %s is no IP address" $where .address) }}
{{- end }}
{{- if and .passwordSecret (not (and .passwordSecret.name .passwordSecret.key)) }}
{{- fail (printf "%s: passwordSecret of the neighbor %s needs a name and a key" $where .address) }}
{{- end }}
{{- end }}
{{- end }}
{{- range $bgp.communities }}
{{- if not (regexMatch "^[0-9]+(:[0-9]+){1,2}$" (toString .)) }}
{{- fail (printf "bgp.communities: %v is neither like \"64512:100\" nor, large, like \"64512:1:100\"" .) }}
{{- end }}
{{- end }}
{{- end }}

{{/* The routing daemon that node agents ask what it advertises: KIND=SOCKET, a path of the node. Empty: none. */}}
{{- define "purelb.bgp.daemon" -}}
{{- if .Values.bird.enabled }}bird=/run/purelb/bird/bird.ctl
{{- else if .Values.frr.enabled }}frr=/run/purelb/frr/bgpd.vty
{{- else }}{{ .Values.lbnodeagent.routingDaemon }}
{{- end }}
{{- end }}

{{/* Name of the interface whose addresses are announced. */}}
{{- define "purelb.bgp.interface" -}}
{{- .Values.lbnodeagent.dummyInterface | default .Values.lbnodeagent.extlbint | default "kube-lb0" }}
{{- end }}

{{/* What the generated configurations begin with. */}}
{{- define "purelb.bgp.preface" -}}
Made from the chart's values under bgp. What follows a $ is filled in when the Pod starts. Lines with what a node has not,
such as IPv6, and those in which it would be its own neighbor, are left out then.
{{- end }}

{{/* Fills in a configuration: for awk. */}}
{{- define "purelb.bgp.fill" -}}
{
  text = $0
  filled = ""
  while (match(text, /\$[A-Z][A-Z0-9_]*/)) {
    name = substr(text, RSTART + 1, RLENGTH - 1)
    if (!(name in ENVIRON)) next
    filled = filled substr(text, 1, RSTART - 1) ENVIRON[name]
    text = substr(text, RSTART + RLENGTH)
  }
  filled = filled text
  for (name in ENVIRON)
    if (name ~ /^NODE_IPV[46]$/ && index(filled, " neighbor " ENVIRON[name] " ")) next
  print filled
}
{{- end }}

{{/* The beginning of the start scripts: what is filled in. */}}
{{- define "purelb.bgp.start" -}}
set -eu
umask 077 # of the configuration in /run/bgp, which may hold passwords
for address in $(echo "$NODE_IPS" | tr , ' '); do
  case $address in
  *:*) export NODE_IPV6="$address" ;;
  *) export NODE_IPV4="$address" ;;
  esac
done
# A number of 32 bits that no other router has, written as an address: without IPv4 one made of the node's name.
number=$((0x$(printf %s "$NODE_NAME" | sha256sum | cut -c 1-8)))
made="$((number >> 24 & 127 | 1)).$((number >> 16 & 255)).$((number >> 8 & 255)).$((number & 255))"
export ROUTER_ID="${NODE_IPV4:-$made}"
{{- end }}

{{/*
A routing daemon as a DaemonSet and its ConfigMap, for a kind of nodes. Called with {root, kind, daemon, files, readiness,
capabilities, directory}: `files` are those of the ConfigMap, `directory` holds the daemon's sockets.
*/}}
{{- define "purelb.bgp.workload" -}}
{{- $root := .root }}
{{- $values := index $root.Values .daemon }}
{{- $name := empty .kind.name | ternary .daemon (printf "%s-%s" .daemon .kind.name) }}
{{- $component := dict "root" $root "component" $name -}}
apiVersion: v1
kind: ConfigMap
metadata:
  {{- include "purelb.metadata" $component | nindent 2 }}
data:
  {{- range $file, $text := .files }}
  {{ $file }}: |
    {{- $text | nindent 4 }}
  {{- end }}
---
apiVersion: apps/v1
kind: DaemonSet
metadata:
  {{- include "purelb.metadata" $component | nindent 2 }}
spec:
  # One node after the other, each once its first session is up again.
  updateStrategy:
    type: RollingUpdate
    rollingUpdate:
      maxUnavailable: 1
  minReadySeconds: 5
  selector:
    matchLabels:
      {{- include "purelb.selectorLabels" $component | nindent 6 }}
  template:
    metadata:
      labels:
        {{- include "purelb.labels" $component | nindent 8 }}
      annotations:
        checksum/configuration: {{ .files | toJson | sha256sum }}
    spec:
      automountServiceAccountToken: false
      {{- with $root.Values.imagePullSecrets }}
      imagePullSecrets:
        {{- toYaml . | nindent 8 }}
      {{- end }}
      {{- with $root.Values.priorityClassName }}
      priorityClassName: {{ . }}
      {{- end }}
      hostNetwork: true
      terminationGracePeriodSeconds: 10
      nodeSelector:
        {{- mustMerge (dict "kubernetes.io/os" "linux") .kind.nodeSelector ($values.nodeSelector | default dict) | toYaml | nindent 8 }}
      {{- with $values.tolerations }}
      tolerations:
        {{- toYaml . | nindent 8 }}
      {{- end }}
      containers:
        - name: {{ .daemon }}
          image: {{ $values.image | default (include "purelb.imageName" (dict "root" $root "component" .daemon)) | quote }}
          imagePullPolicy: {{ $root.Values.image.pullPolicy }}
          command: [/bin/sh, /etc/bgp/start]
          env:
            - name: NODE_NAME
              valueFrom:
                fieldRef:
                  fieldPath: spec.nodeName
            - name: NODE_IPS
              valueFrom:
                fieldRef:
                  fieldPath: status.hostIPs
            {{- range $index, $neighbor := .kind.neighbors }}
            {{- with $neighbor.passwordSecret }}
            - name: PASSWORD_{{ $index }}
              valueFrom:
                secretKeyRef:
                  name: {{ .name }}
                  key: {{ .key }}
            {{- end }}
            {{- end }}
          readinessProbe:
            exec:
              command: [/bin/sh, -c, {{ .readiness | quote }}]
            periodSeconds: 2
          {{- with $values.resources }}
          resources:
            {{- toYaml . | nindent 12 }}
          {{- end }}
          securityContext:
            allowPrivilegeEscalation: false
            readOnlyRootFilesystem: true
            runAsUser: 0
            seccompProfile:
              type: RuntimeDefault
            capabilities:
              drop: [ALL]
              add: [{{ join ", " .capabilities }}]
          volumeMounts:
            - name: configuration
              mountPath: /etc/bgp
            - name: filled
              mountPath: /run/bgp
            - name: run
              mountPath: {{ .directory }}
            - name: expected
              mountPath: {{ .directory }}/expected
      volumes:
        - name: configuration
          configMap:
            name: {{ $name }}
        # The configuration with addresses and passwords, seen by nobody else.
        - name: filled
          emptyDir:
            medium: Memory
        # Its control socket, by which the node agent, and birdc and vtysh on the node, ask what is advertised.
        - name: run
          hostPath:
            path: /run/purelb/{{ .daemon }}
            type: DirectoryOrCreate
        # Tells the node agent that a daemon is to run on this node, also while its image cannot be pulled.
        - name: expected
          hostPath:
            path: /run/purelb/{{ .daemon }}/expected
            type: DirectoryOrCreate
{{- end }}
