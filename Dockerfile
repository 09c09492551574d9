# syntax=docker/dockerfile:1

FROM rust:1.95-bookworm AS build
WORKDIR /src
# What .dockerignore lets through: the manifest, the lock file and src.
COPY . .
# Dependencies and what was compiled of them stay in the builder's cache, so a change of the sources
# compiles only the sources.
RUN --mount=type=cache,target=/usr/local/cargo/registry \
    --mount=type=cache,target=/src/target \
    cargo build --release --locked --bin pulsebus \
 && install -D -m 0755 target/release/pulsebus /out/pulsebus \
 && install -d -m 0700 /out/state

# glibc as in the build stage, authorities' certificates, a user; no shell and no package manager.
FROM gcr.io/distroless/cc-debian12:nonroot
ARG VERSION=0.1.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="pulsebus" \
      org.opencontainers.image.description="Durable, ordered, searchable and deliverable JSON events beside NATS JetStream and RabbitMQ" \
      org.opencontainers.image.licenses="MIT OR Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.base.name="gcr.io/distroless/cc-debian12:nonroot"
COPY --from=build /out/pulsebus /usr/local/bin/pulsebus
# A named volume takes owner and mode from the folder it is mounted on the first time. A folder of the
# host does not: give it to 65532 first.
COPY --from=build --chown=65532:65532 /out/state /var/lib/pulsebus

# Where data_dir is unless it is configured.
ENV STATE_DIRECTORY=/var/lib/pulsebus
VOLUME /var/lib/pulsebus
USER 65532:65532
# To be reached from outside the container it must listen on 0.0.0.0, which needs a token:
# -e PULSEBUS_HTTP__LISTEN=0.0.0.0:8077 -e PULSEBUS_HTTP__TOKEN=…
EXPOSE 8077
# Alive, not ready: a broker that is away is no reason to start the container anew.
HEALTHCHECK --interval=10s --timeout=5s --start-period=20s --retries=3 \
    CMD ["/usr/local/bin/pulsebus", "healthcheck"]
STOPSIGNAL SIGTERM
ENTRYPOINT ["/usr/local/bin/pulsebus"]
CMD ["run"]
